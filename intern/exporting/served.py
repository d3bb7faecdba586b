"""An export behind a server with OpenAI's chat completions API -> whether it answers and stops as the evaluated model does.

Such servers do not give all probabilities, so answers are compared, not distributions: the proof for programs that this project does not
load itself (vLLM, Ollama, mlx-lm).
"""

from typing import Any

import httpx

from intern.errors import RunError
from intern.exporting.reference import Answer, Reference

_SECONDS = 600.0  # for one answer
_LEAST_EQUAL = 0.5  # share of equal greedy answers of an export that is close to the evaluated model


def ask_server(reference: Reference, url: str, model: str) -> dict[str, Any]:
    """Ask a server all golden prompts.

    Args:
        reference: of the run.
        url: its address, up to /v1.
        model: the export's name there.

    Returns:
        How many answers are equal and end by themselves, and how many `run_on` where the evaluated model's ended.

    Raises:
        RunError: the server cannot be reached or refuses a question.
    """
    answers = []
    with httpx.Client(timeout=_SECONDS) as client:
        for prompt in reference.prompts:
            body = {"model": model, "messages": prompt.messages, "max_tokens": reference.most, "temperature": 0}
            answers.append(_answer(client, f"{url.rstrip('/')}/chat/completions", body))
    pairs = list(zip(reference.answers, answers, strict=True))
    return {
        "prompts": len(pairs),
        "answers_equal": sum(ours.text == theirs.text for ours, theirs in pairs),
        "reference_stops": sum(ours.ended for ours, _ in pairs),
        "stops": sum(theirs.ended for _, theirs in pairs),
        "runs_on": sum(ours.ended and not theirs.ended and theirs.text.startswith(ours.text) for ours, theirs in pairs),
    }


def served_faults(figures: dict[str, Any], is_close: bool) -> list[str]:
    """Return what is wrong with the answers of a server, in words.

    Args:
        figures: from `ask_server`.
        is_close: whether the format keeps nearly all of the model's precision, so that most greedy answers must be equal.
    """
    found = []
    if figures["runs_on"] or (figures["reference_stops"] and not figures["stops"]):
        found.append(
            f"stop tokens: {figures['stops']} of {figures['prompts']} answers end by themselves, of the evaluated model "
            f"{figures['reference_stops']}"
        )
    if is_close and figures["answers_equal"] < _LEAST_EQUAL * figures["prompts"]:
        found.append(
            f"answers: {figures['answers_equal']} of {figures['prompts']} are equal: the server has another model, or renders its "
            "template in another way"
        )
    return found


def _answer(client: httpx.Client, url: str, body: dict[str, Any]) -> Answer:
    try:
        reply = client.post(url, json=body)
        reply.raise_for_status()
        choice = reply.json()["choices"][0]
        return Answer(str(choice["message"]["content"]).strip(), choice["finish_reason"] == "stop")
    except httpx.HTTPStatusError as error:
        text = " ".join(error.response.text.split())[:200]
        raise RunError(f"server={url}: answers {error.response.status_code}: {text}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RunError(f"server={url}: cannot be reached ({type(error).__name__}): start it first") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(f"server={url}: does not answer like OpenAI's chat completions API") from error
