"""Two models and a golden file -> their answers and scores, in a folder that a later start with the same inputs continues."""

import gc
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig

from intern.config.build import build, plain
from intern.config.secrets import from_environment, storable
from intern.data.files import DataFile
from intern.data.prepare import golden_rows
from intern.errors import UserError
from intern.evaluation.bootstrap import FEW
from intern.evaluation.contamination import Overlap, find_overlap
from intern.evaluation.judge import Case, Judge, JudgeConfig
from intern.evaluation.lm_eval_tasks import check_tasks
from intern.evaluation.predictions import Prediction, Predictions, predict
from intern.evaluation.scores import Group, Row, RowScores, score_groups, score_rows
from intern.evaluation.sides import Side, build_sides, fingerprint
from intern.evaluation.turns import COLUMN, each_answer
from intern.inference.generation_values import check_generation
from intern.model.preload import importing
from intern.runs.directory import SCHEMA_VERSION, Run

log = logging.getLogger(__name__)

_FORM = 1  # of predictions: raised with every change of how they are made
_CONTEXTS = (None, "never", "always")
_LEAST_RESAMPLES = 100
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Evaluation:
    """What reports and tables are made from."""

    folder: Path
    sides: tuple[Side, Side]
    file: DataFile
    rows: list[Row]
    groups: list[Group]
    overlap: Overlap
    speed: dict[str, dict[str, float]]  # by model: seconds of answering, tokens per second
    settings: dict[str, Any]  # how answers and intervals were made
    losses_comparable: bool  # both tokenizers split the references alike


def evaluate(cfg: DictConfig, run: Run, against: Run | None, earlier: Sequence[Run] = ()) -> Evaluation:
    """Answer and score a golden file with two models.

    Answers are stored batch by batch, so an evaluation that was interrupted continues where it stopped.

    Args:
        cfg: the composed conf/evaluate.yaml.
        run: the run to evaluate.
        against: another run to compare with, None for the run's own base.
        earlier: runs evaluated before with the same `cfg`: answers of the same base, or of the same other run, are taken from there.

    Returns:
        Scores of every row and group; predictions.jsonl is complete in the evaluation's folder.

    Raises:
        UserError: bad input, or a run that cannot be loaded.
        RunError: a model whose loss is NaN or infinite.
    """
    refusal = _check_options(cfg)
    settings = storable(cfg)
    stored = run.read_config()
    sides = build_sides(run, against, cfg.context, cfg.base_model)
    found = golden_rows(plain(stored.data), cfg.eval_file, any(side.with_context for side in sides))
    if found is None:
        raise UserError("eval_file: the run has none: name a golden file with eval_file=...")
    file, golden = found.file, each_answer(found.rows, stored.data.get("loss_on", "all"))
    overlap = find_overlap(run, golden, cfg.train_file)
    folder = _make_folder(cfg, run, against, file)
    judge = _build_judge(cfg.judge, folder)
    predictions = _predictions(cfg, sides, file, folder, golden, [one.evaluation / folder.name for one in earlier])
    before, after = (score_rows(golden, made, refusal, _verdicts(judge, golden, made)) for made in predictions)
    rows = [
        Row(
            number=row["row"],
            turn=row[COLUMN],
            question=row["question"],
            reference=row["answer"],
            context=row["chunk_text"],
            topic=row["topic"],
            unanswerable=after[index].answer.unanswerable,
            trained=overlap.rows[index],
            seen=overlap.chunks[index],
            before=before[index],
            after=after[index],
        )
        for index, row in enumerate(golden)
    ]
    comparable = all(row.before.prediction.loss_tokens == row.after.prediction.loss_tokens for row in rows)
    return Evaluation(
        folder=folder,
        sides=sides,
        file=file,
        rows=rows,
        groups=score_groups(rows, cfg.seed, cfg.resamples, comparable),
        overlap=overlap,
        speed={side.name: _speed(made) for side, made in zip(sides, (before, after), strict=True)},
        settings={
            **{name: settings[name] for name in ("generation", "batch_size", "seed", "resamples", "refusal_pattern")},
            "judge": {name: settings["judge"][name] for name in ("url", "model")} if judge is not None else None,
        },
        losses_comparable=comparable,
    )


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of metrics.json."""
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
                "context": "always" if side.with_context else "never",
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


def _check_options(cfg: DictConfig) -> re.Pattern[str]:
    """Check what can be checked before anything is read; return the compiled refusal_pattern."""
    if isinstance(cfg.batch_size, bool) or not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: batch_size must be at least 1")
    if not isinstance(cfg.resamples, int) or cfg.resamples < _LEAST_RESAMPLES:
        raise UserError(f"resamples={cfg.resamples}: resamples must be at least {_LEAST_RESAMPLES}")
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: seed must be a whole number of at least 0")
    if cfg.context not in _CONTEXTS:
        raise UserError(f"context={cfg.context}: must be never, always, or null (as the run was trained)")
    check_generation(cfg.generation)
    check_tasks(plain(cfg.harness))
    try:
        return re.compile(cfg.refusal_pattern, re.IGNORECASE)
    except (re.error, TypeError) as error:
        raise UserError(f"refusal_pattern={cfg.refusal_pattern}: not a regular expression ({error})") from error


def _make_folder(cfg: DictConfig, run: Run, against: Run | None, file: DataFile) -> Path:
    name = cfg.name
    if name is None:
        other = f"-against-{against.path.parent.name}-{against.path.name}" if against is not None else ""
        name = file.path.stem + (f"-context_{cfg.context}" if cfg.context else "") + other
    if str(name) != Path(str(name)).name or str(name).startswith("."):
        raise UserError(f"name={name}: give the name of a folder, without slashes")
    folder = run.evaluation / str(name)
    try:
        run.prepare_evaluation(folder.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror})") from error
    return folder


def _build_judge(node: DictConfig, folder: Path) -> Judge | None:
    config = build(JudgeConfig, plain(node), "judge")
    return Judge(config, folder / "judge.jsonl") if config.url else None


def _verdicts(judge: Judge | None, golden: Dataset, predictions: list[Prediction]) -> list[float | None]:
    if judge is None:
        return [None] * len(predictions)
    return judge.score(
        [Case(row["question"], row["answer"], one.answer) for row, one in zip(golden, predictions, strict=True)]
    )


def _predictions(
    cfg: DictConfig, sides: tuple[Side, Side], file: DataFile, folder: Path, golden: Dataset, earlier: list[Path]
) -> list[list[Prediction]]:
    """Return the answers of both models; a model is loaded only if some of its answers are missing."""
    inputs = {
        "form": _FORM,
        "rows": file.sha256,
        "generation": storable(cfg)["generation"],
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "models": [fingerprint(side) for side in sides],
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    if from_environment(cfg):  # what was meant decides the answers, and is not stored itself
        inputs["environment"] = hashlib.sha256(json.dumps(plain(cfg.generation)).encode()).hexdigest()
    if any(golden[COLUMN]):
        inputs["turns"] = "all"
    done = Predictions(folder, json.loads(json.dumps(inputs)))
    for other in earlier:
        done.take_from(other)
    numbers = list(zip(golden["row"], golden[COLUMN], strict=True))
    for run in dict.fromkeys(side.run for side in sides):
        missing = [side for side in sides if side.run == run and done.of(side.name, numbers) is None]
        if missing:
            done.begin()
            _answer(cfg, run, missing, golden, done)
    done.put_in_order([side.name for side in sides])
    made = [done.of(side.name, numbers) for side in sides]
    return [predictions for predictions in made if predictions is not None]


def _answer(cfg: DictConfig, run: Run, sides: list[Side], golden: Dataset, done: Predictions) -> None:
    """Load one run and answer with it, with and without its adapter as `sides` need."""
    with importing(run.read_config_to_load()):
        import torch

        from intern.inference.answer import Intern

    intern = Intern(run, cfg.generation, sides[0].base_model)
    for side in sides:
        with nullcontext() if side.adapted else intern.model.disable_adapter():
            predict(intern, side.name, golden, side.with_context, cfg.batch_size, cfg.seed, done)
    del intern  # the next run's model needs the memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _speed(scores: list[RowScores]) -> dict[str, float]:
    seconds = sum(one.prediction.seconds for one in scores)
    tokens = sum(one.prediction.tokens for one in scores)
    return {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
