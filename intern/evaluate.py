"""python -m intern.evaluate run_dir=latest"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from intern.cli import command
from intern.run import resolve

if TYPE_CHECKING:
    from datasets import Dataset

    from intern.answer import Intern


@dataclass(frozen=True)
class Score:
    """One model on some rows: the loss on the reference answers (nats a token), token F1 of its own answers, the share that ended."""

    loss: float
    f1: float
    stopped: float


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Compares base and adapter on the golden rows."""
    run = resolve(cfg.run_dir)
    from intern.answer import Intern  # heavy: keeps --help and a wrong run_dir fast
    from intern.data import DataFile, read_rows
    from intern.errors import UserError
    from intern.table import show

    intern = Intern(run, cfg.generation, cfg.base_model)
    path, key = (
        (cfg.eval_file, "eval_file") if cfg.eval_file else (intern.cfg.data.eval_file, "data.eval_file of the run")
    )
    if not path:
        raise UserError("eval_file: the run has none, give one")
    rows = read_rows(DataFile.find(path, key), needs_material=intern.prompt.context != "never")
    groups = _groups(rows)
    with intern.model.disable_adapter():
        base = _score(intern, rows, groups, cfg.batch_size, "base")
    adapter = _score(intern, rows, groups, cfg.batch_size, "adapter")
    table = []
    for name, indices in groups.items():
        before, after = base[name], adapter[name]
        table.append(
            [
                f"{name} ({len(indices)})",
                *(f"{before.loss:.2f}", f"{after.loss:.2f}", f"{after.loss / before.loss - 1:+.0%}"),
                *(f"{before.f1:.3f}", f"{after.f1:.3f}", f"{after.f1 / before.f1:.1f} x" if before.f1 else "-"),
                *(f"{before.stopped:.0%}", f"{after.stopped:.0%}"),
            ]
        )
    show(["golden rows", "loss: base", "adapter", "", "token F1: base", "adapter", "", "ended: base", "adapter"], table)


def _groups(rows: "Dataset") -> dict[str, list[int]]:
    """Row indices by what training saw, where the rows say so."""
    marks = list(rows["seen_chunk"])
    groups = {"all": list(range(len(marks)))}
    for name, mark in (("on chunks that training saw", True), ("on chunks that it never saw", False)):
        if indices := [index for index, seen in enumerate(marks) if seen is mark]:
            groups[name] = indices
    return groups


def _score(
    intern: "Intern", rows: "Dataset", groups: dict[str, list[int]], batch_size: int, name: str
) -> dict[str, Score]:
    """The scores of the model as it is now, for each group of rows."""
    from rich.console import Console
    from rich.progress import track

    from intern.generate import answer_losses, generate
    from intern.scoring import token_f1

    questions, references = list(rows["question"]), list(rows["answer"])
    shown = list(rows["chunk_text"]) if intern.prompt.scores_with_material else None
    encoded = intern.prompt.encode(intern.tokenizer, questions, references, shown, intern.cfg.trainer.max_length)
    fitting = [index for index, row in enumerate(encoded) if row is not None]
    inputs = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded if row is not None]
    losses = dict(
        zip(fitting, answer_losses(intern.model, inputs, intern.tokenizer.pad_token_id, batch_size), strict=True)
    )
    answers = generate(intern.model, intern.tokenizer, intern.prompt, intern.generation, questions, shown, batch_size)
    console = Console(stderr=True)
    if console.is_terminal:
        answers = iter(track(answers, description=f"answers of the {name}", total=len(rows), console=console))
    replies = list(answers)
    scores = {}
    for group, indices in groups.items():
        counted = [losses[index] for index in indices if index in losses]
        scores[group] = Score(
            loss=sum(loss for loss, _ in counted) / sum(tokens for _, tokens in counted),
            f1=sum(token_f1(replies[index][0], references[index]) for index in indices) / len(indices),
            stopped=sum(replies[index][1] for index in indices) / len(indices),
        )
    return scores


if __name__ == "__main__":
    main()
