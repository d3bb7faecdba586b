"""A finished run and a format -> a folder for other programs, under its name only once it is proven to be the evaluated model."""

import json
import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intern.errors import RunError, UserError
from intern.exporting.card import card
from intern.exporting.facts import read_facts
from intern.exporting.formats import Format, find_format
from intern.exporting.job import Job, build_job, write_prompt
from intern.exporting.landing import landing
from intern.exporting.licenses import license_of
from intern.exporting.proof import Figures, compare, faults
from intern.exporting.reference import Reference, build_reference
from intern.exporting.served import ask_server, served_faults
from intern.exporting.settings import Settings
from intern.runs.directory import Run
from intern.runs.files import write_text
from intern.runs.untrusted import json_object

log = logging.getLogger(__name__)

RECORD, CARD = "export.json", "README.md"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Export:
    """A finished export: its folder, the bytes of each file by name, and export.json."""

    folder: Path
    sizes: dict[str, int]
    record: dict[str, Any]


def export(run: Run, settings: Settings) -> Export:
    """Write an export of a run and prove it.

    Args:
        run: a finished run.
        settings: checked; `out` does not exist or is empty.

    Returns:
        The export, under its final name.

    Raises:
        UserError: the run or its base cannot be read, or the format cannot hold its model.
        RunError: the export differs too much from the evaluated model, or cannot be written. Nothing is left in `out`.
    """
    assert settings.out is not None
    (name, kind), out = find_format(settings), settings.out
    with landing(out) as folder:
        job = build_job(run, settings)
        reference = build_reference(job.loaded, settings.eval_file, settings.prompts, settings.max_new_tokens)
        log.info("writing %s", kind.summary)
        kind.write(job, folder)
        job.release()
        figures = _prove(job, kind, folder, reference)
        record = _record(job, name, kind, figures)
        write_prompt(job, folder)
        _write_card(job, kind, folder, record)
    return Export(out, sizes_of(out), record)


def prove_served(run: Run, settings: Settings) -> dict[str, Any]:
    """Ask an export through a server and write what came of it into its export.json and card.

    Args:
        run: the run that was exported.
        settings: with `prove` and `server`.

    Returns:
        The new export.json.

    Raises:
        UserError: the folder is no export of this run.
        RunError: the server cannot be reached, or does not answer like the evaluated model; the export stays as it was.
    """
    assert settings.prove is not None and settings.server is not None
    folder, server = settings.prove, settings.server
    record, settings = read_record(folder, settings)
    _, kind = find_format(settings)
    facts = read_facts(run)
    if record.get("run_id") != facts.run_id:
        raise UserError(f"prove={folder}: is not an export of {run.path}: give its run with run_dir=...")
    job = build_job(run, settings)
    reference = build_reference(job.loaded, settings.eval_file, settings.prompts, settings.max_new_tokens)
    served = ask_server(reference, server, settings.served_name)
    if found := served_faults(served, kind.is_close(settings)):
        raise RunError(f"prove={folder}: {kind.program} does not answer like the evaluated model: {'; '.join(found)}")
    record |= {"served": served, "prove": None}
    _write_card(job, kind, folder, record)
    return record


def read_record(folder: Path, settings: Settings) -> tuple[dict[str, Any], Settings]:
    """Return export.json, and the settings with what its files were written with.

    Raises:
        UserError: the folder is no export.
    """
    record = json_object(folder / RECORD, folder)
    stored = record.get("settings")
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(stored, dict):
        raise UserError(f"{folder / RECORD}: is not of an export of this version")
    options = {
        "weights": ("trained", "original"),
        "dtype": ("bfloat16", "float16"),
        "gguf": ("f16", "q8_0", "q4_k_m"),
    }
    for key, allowed in options.items():
        if stored.get(key) not in allowed:
            raise UserError(f"{folder / RECORD}: settings.{key} must be one of {', '.join(allowed)}")
    return record, replace(
        settings,
        format=str(record.get("format")),
        weights=stored["weights"],
        dtype=stored["dtype"],
        gguf=stored["gguf"],
    )


def open_export(folder: Path, run: Run) -> Export:
    """Return an export that was written before.

    Raises:
        UserError: the folder is no export of this run.
    """
    record = json_object(folder / RECORD, folder)
    if record.get("run_id") != read_facts(run).run_id:
        raise UserError(f"out={folder}: is not an export of {run.path}: choose another folder")
    return Export(folder, sizes_of(folder), record)


def sizes_of(folder: Path) -> dict[str, int]:
    """Return the bytes of each file below a folder, by its path there."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _prove(job: Job, kind: Format, folder: Path, reference: Reference) -> Figures | None:
    """Compare an export with the evaluated model; None if the program that loads it is not installed."""
    consumer = kind.consumer(job, folder)
    if consumer is None:
        return None
    log.info("asking %s %d golden questions", consumer.name, len(reference.prompts))
    try:
        figures = compare(reference, consumer)
    finally:
        consumer.close()
    if found := faults(figures, job.settings.max_mean_kl or kind.limit(job.settings)):
        raise RunError(
            f"format={job.settings.format}: the export is not the model that was evaluated: {'; '.join(found)}. Nothing was written to "
            f"{job.settings.out}"
        )
    return figures


def _record(job: Job, name: str, kind: Format, figures: Figures | None) -> dict[str, Any]:
    settings = job.settings
    proven = figures is not None and kind.is_consumer
    later = None
    if not proven and kind.serve is not None:
        later = f"{kind.serve('.')}\npython -m intern.export run_dir=RUN prove=. server={kind.url}"
    return {
        "schema_version": SCHEMA_VERSION,
        "format": name,
        "settings": {"weights": settings.weights, "dtype": settings.dtype, "gguf": settings.gguf},
        "run_id": read_facts(job.run).run_id,
        "base": job.base_name,
        "program": kind.program,
        "proven": proven,
        "limit_mean_kl": settings.max_mean_kl or kind.limit(settings),
        "figures": figures.to_json() if figures is not None else None,
        "served": None,
        "prove": later,
        "stop_ids": list(job.prompt.stop_ids),
    }


def prove_command(record: dict[str, Any], run: Run, folder: Path) -> str | None:
    """Return the commands that prove an export later, with this machine's paths; None if it is proven."""
    if record["prove"] is None:
        return None
    there = shlex.quote(str(folder))
    return f"cd {there}; " + str(record["prove"]).replace("RUN", shlex.quote(str(run.path.resolve()))).replace(
        "\n", "; "
    )


def _write_card(job: Job, kind: Format, folder: Path, record: dict[str, Any]) -> None:
    """Write export.json and the card: last, since they say that everything else is there."""
    license_name: str | None = None
    if job.settings.license is not None:
        license_id = job.settings.license
    else:
        license_id, license_name = license_of(job.base.name, job.cfg.model.get("revision"))
    base = {
        "name": job.base_name,
        "on_hub": job.on_hub,
        "license": license_id,
        "license_name": license_name,
        "relation": kind.relation,
    }
    text = card(read_facts(job.run), record, base, job.prompt.to_json(), kind.summary, kind.ask(job))
    write_text(folder / CARD, folder, text)
    write_text(folder / RECORD, folder, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
