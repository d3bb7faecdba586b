"""Golden questions answered by the model that is being trained."""

from typing import Any

from intern.data.tokenize import turns
from intern.evaluation.metrics import Answer, mean_score, training_metrics
from intern.inference.generate import build_generation, generate
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
    """Answer golden questions, evenly spread over the file.

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
    generation = build_generation({"max_new_tokens": _MOST_TOKENS, "do_sample": False}, plan.prompt, plan.tokenizer)
    answers = generate(
        model,
        plan.tokenizer,
        plan.prompt,
        generation,
        questions,
        materials,
        batch_size,
        histories=[turns(history) for history in chosen["history"]],
        systems=list(chosen["system"]),
    )
    return [
        {"question": question, "reference": reference, "answer": answer}
        for question, reference, (answer, _) in zip(questions, chosen["answer"], answers, strict=True)
    ]
