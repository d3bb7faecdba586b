"""An exported model and the model that was evaluated, on the same golden prompts -> how far they differ, and what of it is too far."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from intern.exporting.reference import Answer, Reference

Message = dict[str, str]


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of next tokens at some positions.

    Attributes:
        values: (positions, vocabulary), or (positions, most likely tokens).
        ids: (positions, most likely tokens) the tokens of `values`; None: all of the vocabulary.
    """

    values: torch.Tensor
    ids: torch.Tensor | None = None


class Consumer(Protocol):
    """The program that an export is made for, with the export loaded."""

    name: str  # with its version

    def template_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that it makes of a conversation whose last turn is a question."""

    def answers(self, conversations: Sequence[Sequence[Message]], most: int) -> list[Answer]:
        """Its greedy answers, ended where it ends them itself, of `most` tokens at most."""

    def log_probs(self, prompt: Sequence[int], answer: Sequence[int]) -> LogProbs:
        """Its predictions of each token of an answer."""

    def close(self) -> None:
        """Give back its memory."""


@dataclass(frozen=True)
class Figures:
    """What was measured. KL divergence in nats, of the exported model's next-token distribution from the evaluated one's."""

    consumer: str
    prompts: int
    positions: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    answers_equal: int
    reference_stops: int
    stops: int
    templates_equal: int
    runs_on: int  # answers that began as the evaluated model's and did not end where it ended

    def to_json(self) -> dict[str, Any]:
        """What export.json holds."""
        return asdict(self)


def compare(reference: Reference, consumer: Consumer) -> Figures:
    """Ask an exported model everything that the evaluated one was asked.

    Args:
        reference: the evaluated model's tokens, answers and predictions.
        consumer: the export, loaded.
    """
    templates = [consumer.template_ids(prompt.messages) == prompt.ids for prompt in reference.prompts]
    answers = consumer.answers([prompt.messages for prompt in reference.prompts], reference.most)
    kl, same = [], []
    for prompt, expected in zip(reference.prompts, reference.log_probs, strict=True):
        found = consumer.log_probs(prompt.ids, prompt.answer_ids)
        kl.append(divergence(expected, found))
        top = found.values.argmax(-1)
        best = top if found.ids is None else found.ids.gather(-1, top[:, None])[:, 0]
        same.append(best == expected.argmax(-1))
    every = torch.cat(kl)
    pairs = list(zip(reference.answers, answers, strict=True))
    return Figures(
        consumer=consumer.name,
        prompts=len(pairs),
        positions=len(every),
        mean_kl=float(every.mean()),
        p99_kl=float(every.quantile(0.99)),
        top1_agreement=float(torch.cat(same).float().mean()),
        answers_equal=sum(ours.text == theirs.text for ours, theirs in pairs),
        reference_stops=sum(ours.ended for ours, _ in pairs),
        stops=sum(theirs.ended for _, theirs in pairs),
        templates_equal=sum(templates),
        runs_on=sum(ours.ended and not theirs.ended and theirs.text.startswith(ours.text) for ours, theirs in pairs),
    )


def divergence(expected: torch.Tensor, found: LogProbs) -> torch.Tensor:
    """Return KL(expected || found) at each position, in nats.

    Args:
        expected: (positions, vocabulary) log-probabilities.
        found: if only its most likely tokens are known, all others count as one token, which bounds the divergence from below.
    """
    if found.ids is None:
        ours, theirs = expected.double(), found.values.double()
    else:
        ours, theirs = _with_rest(expected.double().gather(-1, found.ids)), _with_rest(found.values.double())
    return (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0).float()


def _with_rest(values: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all other tokens."""
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
    return torch.cat([values, rest.log()], dim=-1)


def faults(figures: Figures, limit: float) -> list[str]:
    """Return what of an export differs too much from what was evaluated, in words; nothing if it is proven.

    Args:
        figures: from `compare`.
        limit: of the mean KL divergence, in nats.
    """
    found = []
    if figures.templates_equal < figures.prompts:
        wrong = figures.prompts - figures.templates_equal
        found.append(f"chat template: {wrong} of {figures.prompts} prompts become other tokens than in training")
    if figures.runs_on or (figures.reference_stops and not figures.stops):
        found.append(
            f"stop tokens: {figures.stops} of {figures.prompts} answers end by themselves, of the evaluated model "
            f"{figures.reference_stops}"
        )
    if not figures.mean_kl <= limit:  # also true for NaN
        found.append(
            f"weights: mean KL divergence {figures.mean_kl:.3g} is above {limit:g} (99th percentile {figures.p99_kl:.3g}, same most "
            f"likely token at {figures.top1_agreement:.1%} of {figures.positions} positions)"
        )
    return found
