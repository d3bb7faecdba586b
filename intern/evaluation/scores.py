"""Predictions of two models -> the scores of every row, and every metric of groups of rows with its interval."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from intern.evaluation.bootstrap import FEW, FEW_MARK, Array, Estimate, PairedScore, paired_bootstrap
from intern.evaluation.metrics import METRICS, Answer, Metric
from intern.evaluation.predictions import Prediction
from intern.evaluation.text_scores import invented_numbers, missing_numbers

_SEEN = {True: "on chunks that training saw", False: "on chunks that it never saw"}


@dataclass(frozen=True)
class RowScores:
    """One model on one golden row."""

    prediction: Prediction
    answer: Answer
    values: dict[str, float | None]  # by metric; None: the row does not count
    missing: list[str]  # numbers of the reference that the answer lacks
    invented: list[str]  # numbers of the answer that are in neither reference, question nor context

    @property
    def loss(self) -> float | None:
        """Return the loss on the reference in nats per token."""
        return self.prediction.loss / self.prediction.loss_tokens if self.prediction.loss is not None else None


@dataclass(frozen=True)
class Row:
    """One golden row with the answers of both models."""

    number: int  # the line of the golden file
    question: str
    reference: str
    context: str | None
    topic: str | None
    unanswerable: bool  # its reference says that the context does not have the answer
    trained: bool | None  # training had this question with this answer
    seen: bool | None  # training had its chunk
    before: RowScores
    after: RowScores
    turn: int = 0  # of a conversation, from 1; 0: the row has one question


@dataclass(frozen=True)
class Group:
    """Some rows and the scores of both models on them."""

    name: str
    kind: str  # all, chunks, trained or topic
    rows: int
    trained_rows: int
    seen_chunks: int
    unknown_chunks: int  # rows of which nothing says whether training saw their chunk
    scores: dict[str, PairedScore]  # by metric
    counted: dict[str, int]  # rows that each metric is computed from

    @property
    def label(self) -> str:
        """Return the name with the number of rows, a mark if they are few, and how many of them training had."""
        few = f" {FEW_MARK}" if self.rows < FEW else ""
        trained = f", {self.trained_rows} trained on" if self.trained_rows and self.kind != "trained" else ""
        return f"{self.name} ({self.rows}{few}{trained})"


def score_rows(
    golden: Dataset, predictions: Sequence[Prediction], refusal: re.Pattern[str], verdicts: Sequence[float | None]
) -> list[RowScores]:
    """Score one model's answers with every metric.

    Args:
        golden: rows with question, answer and chunk_text.
        predictions: one per row, in the same order.
        refusal: matches a text that says that the context does not have the answer.
        verdicts: of the judging model, one per row; None: no verdict.
    """
    scored = []
    for row, one, verdict in zip(golden, predictions, verdicts, strict=True):
        answer = Answer(
            text=one.answer,
            reference=row["answer"],
            question=row["question"],
            context=row["chunk_text"],
            unanswerable=bool(refusal.search(row["answer"])),
            refused=bool(refusal.search(one.answer)),
            ended=one.ended,
            tokens=one.tokens,
            loss=one.loss,
            loss_tokens=one.loss_tokens,
            judged=verdict,
        )
        scored.append(
            RowScores(
                prediction=one,
                answer=answer,
                values={name: metric.score(answer) for name, metric in METRICS.items()},
                missing=sorted(missing_numbers(answer.text, answer.reference)),
                invented=sorted(invented_numbers(answer.text, (answer.reference, answer.question, answer.context))),
            )
        )
    return scored


def score_groups(rows: list[Row], seed: int, resamples: int, losses_comparable: bool) -> list[Group]:
    """Score all rows, then the rows by what training saw, then by topic; groups without rows are left out.

    Args:
        rows: at least one.
        seed: of the bootstrap.
        resamples: bootstrap draws for each interval.
        losses_comparable: whether both tokenizers split the references alike; if not, metrics per token have no difference.
    """
    groups = [("all", "all", rows)]
    groups += [(name, "chunks", [row for row in rows if row.seen is seen]) for seen, name in _SEEN.items()]
    groups.append(("identical to training rows", "trained", [row for row in rows if row.trained]))
    groups += [
        (topic, "topic", [row for row in rows if row.topic == topic])
        for topic in sorted({row.topic for row in rows if row.topic})
    ]
    return [
        _score_group(name, kind, chosen, seed, resamples, losses_comparable) for name, kind, chosen in groups if chosen
    ]


def _score_group(name: str, kind: str, rows: list[Row], seed: int, resamples: int, losses_comparable: bool) -> Group:
    contexts = {row.number: row.context for row in rows if row.context}  # the last turn of a conversation has it
    clusters = [contexts.get(row.number, row.number) for row in rows]
    scores, counted = {}, {}
    for key, metric in METRICS.items():
        # A row counts for both models or for neither.
        known = [row.before.values[key] is not None and row.after.values[key] is not None for row in rows]
        before = _sums(key, metric, [row.before for row in rows], known)
        after = _sums(key, metric, [row.after for row in rows], known)
        score = paired_bootstrap(before, after, clusters, seed, resamples, metric.exponential, metric.share)
        if metric.per_token and not losses_comparable:
            score = replace(score, difference=Estimate(None, None, None))
        scores[key], counted[key] = score, int(np.count_nonzero(before[1]))
    return Group(
        name=name,
        kind=kind,
        rows=len(rows),
        trained_rows=sum(bool(row.trained) for row in rows),
        seen_chunks=sum(bool(row.seen) for row in rows),
        unknown_chunks=sum(row.seen is None for row in rows),
        scores=scores,
        counted=counted,
    )


def _sums(key: str, metric: Metric, side: list[RowScores], known: list[bool]) -> tuple[Array, Array]:
    """Return numerators and denominators of one model, each of shape (rows,)."""
    pairs = [
        (one.values[key] or 0.0, metric.weight(one.answer)) if counts else (0.0, 0.0)
        for one, counts in zip(side, known, strict=True)
    ]
    return np.array([top for top, _ in pairs], dtype=float), np.array([bottom for _, bottom in pairs], dtype=float)
