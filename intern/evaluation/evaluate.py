"""Two models and a golden file -> their answers, scores with intervals, and a folder that holds all of it."""

import dataclasses
import gc
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from omegaconf import DictConfig

from intern.config.build import build, plain
from intern.data.files import DataFile
from intern.data.prepare import golden_rows
from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.evaluation.bootstrap import FEW, FEW_MARK, Comparison, Estimate, Figures, compare
from intern.evaluation.contamination import Overlap, find_overlap
from intern.evaluation.judge import Case, Judge, JudgeConfig
from intern.evaluation.metrics import (
    exact_match,
    figures_right,
    invented_figures,
    missing_figures,
    rouge_l,
    token_f1,
)
from intern.evaluation.predictions import Prediction, Predictions, predict
from intern.model.preload import importing
from intern.paths import find
from intern.runs.directory import SCHEMA_VERSION, Run

log = logging.getLogger(__name__)

_FORM = 1  # of predictions: raised with every change of how they are made
_CONTEXTS = (None, "never", "always")
_SEEN = "on chunks that training saw", "on chunks that it never saw"
_NO_SHARES = ("loss", "perplexity", "answer_tokens")
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared: a run with its adapter, or its base alone."""

    name: str
    run: Run
    adapted: bool
    with_material: bool


@dataclass(frozen=True)
class RowScores:
    """One model on one golden row."""

    prediction: Prediction
    exact_match: float
    token_f1: float
    rouge_l: float
    figures_right: float | None
    missing: list[str]  # numbers of the reference that the answer lacks
    invented: list[str]  # numbers of the answer that nothing gave it
    refused: bool
    judged: float | None

    @property
    def loss(self) -> float | None:
        """Nats a token on the reference."""
        return self.prediction.loss / self.prediction.loss_tokens if self.prediction.loss is not None else None


@dataclass(frozen=True)
class Row:
    """One golden row with what both models made of it."""

    number: int
    question: str
    reference: str
    chunk: str | None
    topic: str | None
    unanswerable: bool  # its reference says that the material does not say
    trained: bool | None  # training had this question with this answer
    seen: bool | None  # training had its chunk
    before: RowScores
    after: RowScores


@dataclass(frozen=True)
class Group:
    """Some rows and the scores of both models on them."""

    name: str
    kind: str  # all, chunks, trained or topic
    rows: int
    trained_rows: int
    seen_chunks: int
    scores: dict[str, Comparison]
    counted: dict[str, int]  # rows that each score is over

    @property
    def label(self) -> str:
        """The name as every table shows it: with its size, a mark where that is small, and what training had of it."""
        few = f" {FEW_MARK}" if self.rows < FEW else ""
        trained = f", {self.trained_rows} trained on" if self.trained_rows and self.kind != "trained" else ""
        return f"{self.name} ({self.rows}{few}{trained})"


@dataclass(frozen=True)
class Evaluation:
    """What the report and the tables are made from."""

    folder: Path
    sides: tuple[Side, Side]
    file: DataFile
    rows: list[Row]
    groups: list[Group]
    overlap: Overlap
    speed: dict[str, dict[str, float]]  # by model: seconds of answering, answer tokens a second
    settings: dict[str, Any]  # how answers and intervals were made
    losses_comparable: bool  # both tokenizers split the references alike


def evaluate(cfg: DictConfig, run: Run, against: Run | None) -> Evaluation:
    """Answers and scores a golden file with two models; a start that was cut short is gone on with.

    Args:
        cfg: the composed conf/evaluate.yaml.
        run: the run to evaluate.
        against: another run to compare with, None for the run's own base.

    Raises:
        UserError: bad input, or a run that cannot be loaded.
        RunError: a model whose loss is no number.
    """
    refusal = _pattern(cfg.refusal_pattern)
    if (
        not isinstance(cfg.batch_size, int)
        or cfg.batch_size < 1
        or not isinstance(cfg.resamples, int)
        or cfg.resamples < 100
    ):
        raise UserError("batch_size must be at least 1, resamples at least 100")
    if cfg.context not in _CONTEXTS:
        raise UserError(f"context={cfg.context}: must be never, always, or null (as the run was trained)")
    stored = run.read_config()
    sides = _sides(run, against, cfg.context)
    found = golden_rows(plain(stored.data), cfg.eval_file, any(side.with_material for side in sides))
    if found is None:
        raise UserError("eval_file: the run has none, give one")
    file, golden = found.file, found.rows
    overlap = find_overlap(run, golden, cfg.train_file)
    folder = _folder(cfg, run, against, file)
    judge = _judge(cfg.judge, folder)
    done = _predictions(cfg, sides, file, folder, golden)
    numbers = list(golden["row"])
    both: list[list[RowScores]] = []
    for side in sides:
        predictions = done.of(side.name, numbers)
        assert predictions is not None  # `_predictions` made every one
        both.append(_row_scores(golden, predictions, refusal, judge))
    rows = [
        Row(
            number=row["row"],
            question=row["question"],
            reference=row["answer"],
            chunk=row["chunk_text"],
            topic=row["topic"],
            unanswerable=bool(refusal.search(row["answer"])),
            trained=overlap.rows[index],
            seen=overlap.chunks[index],
            before=both[0][index],
            after=both[1][index],
        )
        for index, row in enumerate(golden)
    ]
    comparable = all(row.before.prediction.loss_tokens == row.after.prediction.loss_tokens for row in rows)
    return Evaluation(
        folder=folder,
        sides=sides,
        file=file,
        rows=rows,
        groups=[
            _score(name, kind, chosen, cfg.seed, cfg.resamples, comparable) for name, kind, chosen in _groups(rows)
        ],
        overlap=overlap,
        speed={side.name: _speed(scores) for side, scores in zip(sides, both, strict=True)},
        settings={
            "generation": plain(cfg.generation),
            "batch_size": cfg.batch_size,
            "seed": cfg.seed,
            "resamples": cfg.resamples,
            "refusal_pattern": cfg.refusal_pattern,
            "judge": {"url": cfg.judge.url, "model": cfg.judge.model} if judge is not None else None,
        },
        losses_comparable=comparable,
    )


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """What metrics.json holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "file": str(evaluation.file.path),
        "file_sha256": evaluation.file.sha256,
        "rows": len(evaluation.rows),
        "models": [
            {
                "name": side.name,
                "run": str(side.run.path),
                "adapter": side.adapted,
                "context": "always" if side.with_material else "never",
                **evaluation.speed[side.name],
            }
            for side in evaluation.sides
        ],
        "settings": evaluation.settings,
        "trained_on": evaluation.overlap.told_by,
        "losses_comparable": evaluation.losses_comparable,
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "rows": group.rows,
                "few_rows": group.rows < FEW,
                "trained_rows": group.trained_rows,
                "rows_on_seen_chunks": group.seen_chunks,
                "scores": {name: {"rows": group.counted[name]} | asdict(score) for name, score in group.scores.items()},
            }
            for group in evaluation.groups
        ],
    }


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except (re.error, TypeError) as error:
        raise UserError(f"refusal_pattern={text}: not a regular expression ({error})") from error


def _sides(run: Run, against: Run | None, context: str | None) -> tuple[Side, Side]:
    def side(name: str, of: Run, adapted: bool) -> Side:
        trained = Prompt.from_json(of.read_json(of.prompt)).scores_with_material
        return Side(name, of, adapted, trained if context is None else context == "always")

    if against is None:
        return side("base", run, False), side("adapter", run, True)
    if against == run:
        raise UserError(f"against={against.path}: is the run itself")
    return side("other run", against, True), side("this run", run, True)


def _folder(cfg: DictConfig, run: Run, against: Run | None, file: DataFile) -> Path:
    name = cfg.name
    if name is None:
        other = f"-against-{against.path.parent.name}-{against.path.name}" if against is not None else ""
        name = file.path.stem + (f"-context_{cfg.context}" if cfg.context else "") + other
    if str(name) != Path(str(name)).name or str(name).startswith("."):
        raise UserError(f"name={name}: give the name of a folder, without slashes")
    folder = run.evaluation / str(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    return folder


def _judge(node: DictConfig, folder: Path) -> Judge | None:
    config = build(JudgeConfig, plain(node), "judge")
    return Judge(config, folder / "judge.jsonl") if config.url else None


def _predictions(
    cfg: DictConfig, sides: tuple[Side, Side], file: DataFile, folder: Path, golden: Dataset
) -> Predictions:
    """The answers of both models; a model is loaded only where some of its answers are not there yet."""
    inputs = {
        "form": _FORM,
        "rows": file.sha256,
        "generation": plain(cfg.generation),
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "models": [_identity(side, _base_model(cfg, sides, side)) for side in sides],
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    done = Predictions(folder, json.loads(json.dumps(inputs)))
    numbers = list(golden["row"])
    for run in dict.fromkeys(side.run for side in sides):
        missing = [side for side in sides if side.run == run and done.of(side.name, numbers) is None]
        if missing:
            _answer(cfg, run, missing, _base_model(cfg, sides, missing[0]), golden, done)
    done.put_in_order([side.name for side in sides])
    return done


def _answer(
    cfg: DictConfig, run: Run, sides: list[Side], base_model: str | None, golden: Dataset, done: Predictions
) -> None:
    with importing(run.read_config()):
        import torch

        from intern.inference.answer import Intern

    intern = Intern(run, cfg.generation, base_model)
    for side in sides:
        with nullcontext() if side.adapted else intern.model.disable_adapter():
            predict(intern, side.name, golden, side.with_material, cfg.batch_size, cfg.seed, done)
    del intern  # the next run's model needs the memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _base_model(cfg: DictConfig, sides: tuple[Side, Side], side: Side) -> str | None:
    """base_model of the command, for every run that was trained from the same base as the evaluated one."""

    def trained_from(one: Side) -> str:
        return str(one.run.read_config().model.pretrained_model_name_or_path)

    same = cfg.base_model is not None and trained_from(side) == trained_from(sides[1])
    return str(cfg.base_model) if same else None


def _identity(side: Side, base_model: str | None) -> dict[str, Any]:
    """All that decides a model's answers. A local base counts by its files' sizes and times: hashing gigabytes takes too long."""
    cfg = side.run.read_config()
    model = plain(cfg.model)
    if base_model is not None:
        model["pretrained_model_name_or_path"] = base_model
    folder = find(model["pretrained_model_name_or_path"])
    adapter = [side.run.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return {
        "name": side.name,
        "model": model,
        "model_files": [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in (sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else [])
        ],
        "quant": plain(cfg.quant),
        "max_length": cfg.trainer.max_length,
        "prompt": side.run.read_json(side.run.prompt),
        "with_material": side.with_material,
        "adapter": [_sha256(file) for file in adapter] if side.adapted else None,
    }


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None  # loading says what is missing
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row_scores(
    golden: Dataset, predictions: list[Prediction], refusal: re.Pattern[str], judge: Judge | None
) -> list[RowScores]:
    verdicts: Sequence[float | None] = [None] * len(predictions)
    if judge is not None:
        cases = [Case(row["question"], row["answer"], one.answer) for row, one in zip(golden, predictions, strict=True)]
        verdicts = judge.score(cases)
    scores = []
    for row, one, verdict in zip(golden, predictions, verdicts, strict=True):
        question, reference, chunk = row["question"], row["answer"], row["chunk_text"]
        scores.append(
            RowScores(
                prediction=one,
                exact_match=exact_match(one.answer, reference),
                token_f1=token_f1(one.answer, reference),
                rouge_l=rouge_l(one.answer, reference),
                figures_right=figures_right(one.answer, reference, question, chunk),
                missing=sorted(missing_figures(one.answer, reference)),
                invented=sorted(invented_figures(one.answer, [reference, question, *([chunk] if chunk else [])])),
                refused=bool(refusal.search(one.answer)),
                judged=verdict,
            )
        )
    return scores


def _groups(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """All rows, then by what training saw, then by topic."""
    groups = [("all", "all", rows)]
    for name, mark in zip(_SEEN, (True, False), strict=True):
        groups.append((name, "chunks", [row for row in rows if row.seen is mark]))
    groups.append(("identical to training rows", "trained", [row for row in rows if row.trained]))
    for topic in sorted({row.topic for row in rows if row.topic}):
        groups.append((topic, "topic", [row for row in rows if row.topic == topic]))
    return [group for group in groups if group[2]]


def _score(name: str, kind: str, rows: list[Row], seed: int, resamples: int, losses_comparable: bool) -> Group:
    clusters = [row.chunk if row.chunk else row.number for row in rows]

    def ratio(values: list[tuple[float, float]]) -> tuple[Figures, Figures]:
        return np.array([top for top, _ in values], dtype=float), np.array(
            [bottom for _, bottom in values], dtype=float
        )

    def mean(
        value: Callable[[Row, RowScores], float | None],
    ) -> tuple[tuple[Figures, Figures], tuple[Figures, Figures]]:
        """A row counts for both models or for neither."""
        pairs = [(value(row, row.before), value(row, row.after)) for row in rows]
        known = [before is not None and after is not None for before, after in pairs]
        both = [
            ratio([(pair[side] or 0.0, 1.0) if known[index] else (0.0, 0.0) for index, pair in enumerate(pairs)])
            for side in (0, 1)
        ]
        return both[0], both[1]

    def losses(side: Callable[[Row], RowScores]) -> tuple[Figures, Figures]:
        fitting = [row.before.prediction.loss is not None and row.after.prediction.loss is not None for row in rows]
        return ratio(
            [
                (side(row).prediction.loss or 0.0, side(row).prediction.loss_tokens) if fits else (0.0, 0.0)
                for row, fits in zip(rows, fitting, strict=True)
            ]
        )

    loss = losses(lambda row: row.before), losses(lambda row: row.after)
    columns = {
        "loss": loss,
        "perplexity": loss,
        "exact_match": mean(lambda row, scores: scores.exact_match),
        "token_f1": mean(lambda row, scores: scores.token_f1),
        "rouge_l": mean(lambda row, scores: scores.rouge_l),
        "figures_right": mean(lambda row, scores: scores.figures_right),
        "judged": mean(lambda row, scores: scores.judged),
        "refused_rightly": mean(lambda row, scores: float(scores.refused) if row.unanswerable else None),
        "refused_wrongly": mean(lambda row, scores: None if row.unanswerable else float(scores.refused)),
        "stopped": mean(lambda row, scores: float(scores.prediction.ended)),
        "answer_tokens": mean(lambda row, scores: float(scores.prediction.tokens)),
    }
    scores = {
        score: compare(
            *both, clusters, seed, resamples, exponential=score == "perplexity", share=score not in _NO_SHARES
        )
        for score, both in columns.items()
    }
    if not losses_comparable:
        for score in ("loss", "perplexity"):
            scores[score] = dataclasses.replace(scores[score], difference=Estimate(None, None, None))
    return Group(
        name=name,
        kind=kind,
        rows=len(rows),
        trained_rows=sum(bool(row.trained) for row in rows),
        seen_chunks=sum(bool(row.seen) for row in rows),
        scores=scores,
        counted={score: int(np.count_nonzero(before[1])) for score, (before, _) in columns.items()},
    )


def _speed(scores: list[RowScores]) -> dict[str, float]:
    seconds = sum(one.prediction.seconds for one in scores)
    tokens = sum(one.prediction.tokens for one in scores)
    return {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
