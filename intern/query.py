"""python -m intern.query run_dir=latest question="What did Uber earn in 2024?" """

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from intern.cli.command import command
from intern.cli.messages import say
from intern.data.question_history import read_history
from intern.display.text import in_lines, valid
from intern.errors import UserError
from intern.inference.generation_values import check_generation
from intern.model.preload import importing
from intern.runs.directory import Run
from intern.runs.find import resolve

if TYPE_CHECKING:
    from intern.inference.answer import Intern


@command("query")
def main(cfg: DictConfig) -> None:
    """Answers a question with a finished run."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="replace")
    exported = Path(str(cfg.run_dir)).expanduser()
    is_export = (exported / "export.json").is_file()
    run = Run(exported.resolve()) if is_export else resolve(cfg.run_dir)
    check_generation(cfg.generation)
    history = read_history(cfg.history)
    intern = _load_export(run.path, cfg) if is_export else _load_run(run, cfg)
    context = valid(str(cfg.context)) if cfg.context is not None else None
    if cfg.question is not None:
        sys.stdout.write(_shown(intern.answer(valid(str(cfg.question)), context, history)) + "\n")
        return
    say(f"{run.path}: ask a question; Ctrl-D ends")
    while question := _ask():
        try:
            for piece in intern.stream(question, context, history):
                sys.stdout.write(_shown(piece))
                sys.stdout.flush()
            sys.stdout.write("\n")
        except UserError as error:  # this question cannot be answered, the next one may
            say(str(error))


def _load_run(run: Run, cfg: DictConfig) -> "Intern":
    with importing(run.read_config_to_load()):
        from intern.inference.answer import Intern  # heavy: keeps --help and a wrong run_dir fast

    return Intern(run, cfg.generation, cfg.base_model)


def _load_export(folder: Path, cfg: DictConfig) -> "Intern":
    if cfg.base_model is not None:
        raise UserError("base_model: an export holds its base's weights: leave it out")
    from intern.exporting.exported_model import ExportedModel

    return ExportedModel(folder, cfg.generation)


def _shown(answer: str) -> str:
    """Return an answer's own characters, except in a terminal, which control characters would command."""
    return in_lines(answer) if sys.stdout.isatty() else answer


def _ask() -> str | None:
    sys.stderr.write("> ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    while line and not line.strip():
        line = sys.stdin.readline()
    return line.strip() or None


if __name__ == "__main__":
    main()
