"""Golden questions answered by the model that is being trained."""

from typing import Any

from intern import processes
from intern.data.tokenize import turns
from intern.evaluation.metrics import Answer, mean_score, training_metrics
from intern.inference.generate import generate, positions_of
from intern.inference.generation_values import Generation
from intern.training.plan import TrainingPlan

_MOST_TOKENS = 128  # of an answer


def score_answers(model: Any, plan: TrainingPlan) -> dict[str, float]:
    """Return the scores of the answers to trainer.eval_answers golden questions, by their keys in a log entry such as eval_f1."""
    answered = answer_golden_questions(
        model, plan, plan.rules.eval_answers, batch_size=plan.args.per_device_eval_batch_size
    )
    answers = [Answer(row["answer"], row["reference"], row["question"]) for row in answered]
    return {key: mean_score(name, answers) for key, name in training_metrics().items()}


def answer_golden_questions(model: Any, plan: TrainingPlan, count: int, batch_size: int) -> list[dict[str, str]]:
    """Answer golden questions, evenly spread over the file. Several processes share them.

    Args:
        model: the model with its adapter.
        plan: has the golden rows.
        count: questions; a file with fewer has all of them answered.
        batch_size: questions at a time.

    Returns:
        `question`, `reference` and `answer` of each.
    """
    assert plan.eval_rows is not None
    rows = plan.eval_rows
    chosen = rows.select(range(0, len(rows), max(1, len(rows) // count))).select(range(min(count, len(rows))))
    questions = list(chosen["question"])
    materials = list(chosen["chunk_text"]) if plan.prompt.scores_with_material else None
    histories = [turns(history) for history in chosen["history"]]
    systems = list(chosen["system"])
    positions = positions_of(plan.base.config)
    tokens = _MOST_TOKENS if positions is None else min(_MOST_TOKENS, max(1, positions // 4))
    # A question that leaves no room for an answer gets none: training must not end because of it.
    fits = plan.prompt.encode(
        plan.tokenizer,
        questions,
        materials=materials,
        max_length=None if positions is None else positions - tokens,
        histories=histories,
        systems=systems,
    )
    fitting = [index for index, one in enumerate(fits) if one is not None]
    here = processes.place()
    asked = [
        index for place, index in enumerate(fitting) if place // batch_size % here.size == here.rank
    ]  # whole batches
    answers = generate(
        model,
        plan.tokenizer,
        plan.prompt,
        Generation(tokens).config(plan.prompt, plan.tokenizer),
        [questions[index] for index in asked],
        [materials[index] for index in asked] if materials is not None else None,
        batch_size,
        histories=[histories[index] for index in asked],
        systems=[systems[index] for index in asked],
    )
    mine = list(zip(asked, (reply.text for reply in answers), strict=True))
    texts = dict(one for part in processes.gather(mine) for one in part)
    return [
        {"question": question, "reference": reference, "answer": texts.get(index, "")}
        for index, (question, reference) in enumerate(zip(questions, chosen["answer"], strict=True))
    ]
