"""Metrics: how an answer is scored against its reference, how scores of rows are aggregated, and where each metric is shown.

A new metric is one entry in METRICS. Evaluations, reports, comparisons of runs and evaluations during training read everything from it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from intern.evaluation.text_scores import exact_match, numbers_right, rouge_l, token_f1


@dataclass(frozen=True)
class Answer:
    """One model's answer to one golden row, with everything that a metric may need."""

    text: str
    reference: str
    question: str = ""
    context: str | None = None  # the row's chunk_text, even if the model was not shown it
    unanswerable: bool = False  # the reference says that the context does not have the answer
    refused: bool = False  # the answer says so
    ended: bool = True  # with an end of turn; False: cut off at max_new_tokens
    tokens: int = 0
    loss: float | None = None  # nats, summed over the reference's tokens; None: the row does not fit into the model
    loss_tokens: int = 0
    judged: float | None = None  # verdict of the judging model, 0 to 1


class Place(Enum):
    """Where a metric is shown besides the reports' full tables."""

    CARD = auto()  # at the top of the page
    PLOT = auto()  # a panel of scores.png
    TOPICS = auto()  # columns of the table by topic
    TERMINAL = auto()  # printed by python -m intern.evaluate
    COMPARE = auto()  # a column of python -m intern.compare
    TRAINING = auto()  # offered to evaluations during training: needs nothing but the answer and its reference


class Change(Enum):
    """How the terminal shows the change from the first model to the second."""

    NONE = auto()
    PERCENT = auto()
    TIMES = auto()


@dataclass(frozen=True)
class Metric:
    """One metric.

    A score of several rows is the sum of `score` divided by the sum of `weight`: a mean, unless a weight is given. A row counts only if
    both models have a score for it.
    """

    label: str
    higher_is_better: bool | None  # None: neither
    format: str
    score: Callable[[Answer], float | None]  # None: the row does not count
    weight: Callable[[Answer], float] = lambda answer: 1.0
    share: bool = False  # each row scores from 0 to 1
    exponential: bool = False  # e to the power of the mean
    per_token: bool = False  # cannot be compared if the two tokenizers split the references differently
    short: str = ""  # label in tables with little room; the label if empty
    places: frozenset[Place] = frozenset()
    change: Change = Change.NONE
    needs: str = ""  # arguments that python -m intern.evaluate needs to compute it
    training_name: str = ""  # name in evaluations during training, without "eval_"; the metric's own if empty
    former_name: str = ""  # in metrics.json of runs that were evaluated before it was renamed

    @property
    def short_label(self) -> str:
        return self.short or self.label


def metrics_at(place: Place) -> dict[str, Metric]:
    """Return the metrics that are shown at a place, by name, in the order of METRICS."""
    return {name: metric for name, metric in METRICS.items() if place in metric.places}


def training_metrics() -> dict[str, str]:
    """Return what trainer.metric_for_best_model may name besides the loss: the key in a log entry -> the metric's name."""
    return {f"eval_{metric.training_name or name}": name for name, metric in metrics_at(Place.TRAINING).items()}


def mean_score(name: str, answers: Iterable[Answer]) -> float:
    """Return the score of some answers in one metric.

    Args:
        name: a key of METRICS.
        answers: at least one that the metric can score.
    """
    metric = METRICS[name]
    known = [(score, metric.weight(answer)) for answer in answers if (score := metric.score(answer)) is not None]
    return sum(score for score, _ in known) / sum(weight for _, weight in known)


METRICS: dict[str, Metric] = {
    "loss": Metric(
        "loss (nats per token)",
        False,
        ".2f",
        lambda answer: answer.loss,
        weight=lambda answer: answer.loss_tokens,
        per_token=True,
        short="loss",
        places=frozenset({Place.CARD, Place.PLOT, Place.TOPICS, Place.TERMINAL}),
        change=Change.PERCENT,
    ),
    "perplexity": Metric(
        "perplexity",
        False,
        ".1f",
        lambda answer: answer.loss,
        weight=lambda answer: answer.loss_tokens,
        per_token=True,
        exponential=True,
    ),
    "exact_match": Metric(
        "exact match",
        True,
        ".1%",
        lambda answer: exact_match(answer.text, answer.reference),
        share=True,
        places=frozenset({Place.TRAINING}),
    ),
    "token_f1": Metric(
        "token F1",
        True,
        ".3f",
        lambda answer: token_f1(answer.text, answer.reference),
        share=True,
        places=frozenset(Place),
        change=Change.TIMES,
        training_name="f1",
    ),
    "rouge_l": Metric(
        "ROUGE-L",
        True,
        ".3f",
        lambda answer: rouge_l(answer.text, answer.reference),
        share=True,
        places=frozenset({Place.PLOT, Place.COMPARE, Place.TRAINING}),
    ),
    "numbers_right": Metric(
        "numbers right",
        True,
        ".1%",
        lambda answer: numbers_right(answer.text, answer.reference, answer.question, answer.context),
        share=True,
        places=frozenset({Place.CARD, Place.PLOT, Place.TOPICS, Place.COMPARE}),
        former_name="figures_right",
    ),
    "judged": Metric(
        "right, as judged by a model",
        True,
        ".1%",
        lambda answer: answer.judged,
        share=True,
        short="judged right",
        places=frozenset({Place.COMPARE}),
        needs="judge.url=... judge.model=...",
    ),
    "refused_rightly": Metric(
        "refused when the context does not say",
        True,
        ".1%",
        lambda answer: float(answer.refused) if answer.unanswerable else None,
        share=True,
        places=frozenset({Place.CARD}),
    ),
    "refused_wrongly": Metric(
        "refused when it does say",
        False,
        ".1%",
        lambda answer: None if answer.unanswerable else float(answer.refused),
        share=True,
        places=frozenset({Place.CARD}),
    ),
    "stopped": Metric(
        "ended by itself",
        True,
        ".1%",
        lambda answer: float(answer.ended),
        share=True,
        short="ended",
        places=frozenset({Place.TERMINAL}),
    ),
    "answer_tokens": Metric("length of the answer (tokens)", None, ".1f", lambda answer: float(answer.tokens)),
}
MAIN_METRIC = "token_f1"  # orders the best and worst rows of a report
