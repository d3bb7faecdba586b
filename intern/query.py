"""python -m intern.query run_dir=latest question="What did Uber earn in 2024?" """

import io
import sys

from omegaconf import DictConfig

from intern.cli.command import command
from intern.cli.messages import say
from intern.data.question_history import read_history
from intern.display.text import in_lines, valid
from intern.errors import UserError
from intern.inference.generation_values import check_generation
from intern.model.preload import importing
from intern.runs.find import resolve


@command("query")
def main(cfg: DictConfig) -> None:
    """Answers a question with a finished run."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="replace")
    run = resolve(cfg.run_dir)
    check_generation(cfg.generation)
    history = read_history(cfg.history)
    with importing(run.read_config_to_load()):
        from intern.inference.answer import Intern  # heavy: keeps --help and a wrong run_dir fast

    intern = Intern(run, cfg.generation, cfg.base_model)
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
