"""A task function -> a command that runs it with Hydra.

A user's mistake is one line without a traceback, except with HYDRA_FULL_ERROR=1. Exit codes: 0 done, 1 failed, 2 bad input, 130
interrupted.

Two things of the process are changed around Hydra, which offers no other way:

- `sys.argv`: Hydra reads the command line itself, so overrides that need quoting, and resume=, are rewritten there.
- HYDRA_FULL_ERROR: only with it does Hydra raise its errors instead of printing them and exiting. It is set while Hydra composes the
  configuration, and has the user's own value while the task runs, since processes that the task starts inherit it.
"""

import contextlib
import difflib
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from intern.cli import sweep
from intern.cli.help import help_text
from intern.cli.messages import say
from intern.cli.start import remove_unused
from intern.config.build import literal_text
from intern.config.secrets import refuse, refuse_arguments
from intern.config.suggestions import unknown, with_origin
from intern.errors import RunError, UserError, one_line
from intern.paths import CONF_DIR
from intern.runs.disk import unwritable

log = logging.getLogger(__name__)

# Keys of every command whose values are a person's words or paths.
WORDS = frozenset(
    {
        "against",
        "base_model",
        "base_name",
        "context",
        "data.chat_template",
        "data.eval_file",
        "data.system_prompt",
        "data.train_file",
        "eval_file",
        "generation.stop_strings",
        "harness.include_path",
        "history",
        "html",
        "hydra.run.dir",
        "hydra.sweep.dir",
        "lengths",
        "logger.name",
        "lora.exclude_modules",
        "lora.target_modules",
        "logger.project",
        "model.pretrained_model_name_or_path",
        "model.quantized_cache",
        "name",
        "notes",
        "out",
        "output_dir",
        "prove",
        "question",
        "resume",
        "run_dir",
        "train_file",
    }
)
_LISTS = {
    "data.eval_file",
    "data.train_file",
    "generation.stop_strings",
    "lora.exclude_modules",
    "lora.target_modules",
}  # may hold several: [a,b]
_SWEPT = (
    "data.",
    "model.",
    "logger.",
    "lora.",
)  # groups whose keys a sweep may give several values, separated by commas
_INTERPOLATED = {"hydra.run.dir", "hydra.sweep.dir", "model.quantized_cache"}  # ${now:...} is Hydra's in these
_NO_NAME = (int, float, type(None))  # values of an override that name no option
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_ROOM = "free some space or make it writable, then run the same command again"
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def command(
    config_name: str, free_text: tuple[str, ...] = (), prepare: Callable[[list[str]], list[str]] = list
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a task the command whose configuration is conf/<config_name>.yaml.

    Args:
        config_name: the primary config.
        free_text: the command's own keys whose values are free text or paths, besides `WORDS`: a user quotes them for the shell, but not
            for Hydra's grammar.
        prepare: changes the command line before Hydra reads it.
    """
    words = WORDS | set(free_text)

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)
        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            try:
                _refuse_credentials(cfg)
                with _full_errors("1" if WANTS_TRACEBACK else None):  # for processes that the task starts
                    return task(cfg)
            except Exception as error:  # of any kind: nothing is swallowed
                # Logged here, while the job's own log file is open.
                if WANTS_TRACEBACK:
                    log.exception("%s", type(error).__name__)
                elif sweep.folder(HydraConfig.get()) is not None:
                    log.error("%s", _located(one_line(error)))
                    sweep.log_file.error("its traceback:", exc_info=error)
                elif isinstance(error, UserError | RunError):
                    log.error("%s", _located(str(error)))
                elif (found := unwritable(error)) is not None:
                    log.error("%s: %s: %s", found[0] or "a file", found[1], _ROOM)
                else:
                    log.exception("%s", type(error).__name__)
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    return sweep.record_failure(error)  # the other jobs continue
                sys.exit(2 if isinstance(error, UserError) else 1)
            except (KeyboardInterrupt, SystemExit):
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    sweep.warn_stopped(HydraConfig.get())
                raise

        @functools.wraps(task)
        def main() -> None:
            # A log file that cannot be written, on a full disk, must not bury the error line under logging's own tracebacks.
            logging.raiseExceptions = False
            if {"--help", "-h"} & set(sys.argv[1:]):
                example = str(sys.modules[task.__module__].__doc__).strip()
                sys.stdout.write(help_text(config_name, str(task.__doc__).strip(), example))
            try:
                refuse_arguments(sys.argv[1:])
                check_groups(sys.argv[1:])
                sys.argv[1:] = prepare(literal(sys.argv[1:], words))
                with _full_errors("1"):  # Hydra raises its own errors instead of printing them
                    job()
            except (HydraException, OmegaConfBaseException, UserError) as error:
                if WANTS_TRACEBACK:
                    raise
                say(_composition_fault(error))
                sys.exit(2)
            except OSError as error:
                if WANTS_TRACEBACK:
                    raise
                # The task's own errors are logged by its job: this one is about the folder that Hydra makes before.
                if error.filename is None:  # what os.getcwd raises
                    say(f"the working directory cannot be used ({error.strerror}): change to another one")
                else:
                    say(f"{error.filename}: cannot be written ({error.strerror}): choose another hydra.run.dir")
                sys.exit(2)
            except KeyboardInterrupt:
                sys.exit(130)
            finally:
                remove_unused()
            if sweep.record.failures:
                sys.exit(sweep.record.exit_code)

        return main

    return decorate


@contextlib.contextmanager
def _full_errors(value: str | None) -> Iterator[None]:
    """Set HYDRA_FULL_ERROR inside the block; None: it is not set."""
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        if value is not None:
            os.environ["HYDRA_FULL_ERROR"] = value
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def literal(arguments: Sequence[str], words: Collection[str] = WORDS) -> list[str]:
    """Return a command line as Hydra reads it: values of `words` mean their characters, whatever those are to Hydra's grammar.

    Values that stay as they are: null, one text wholly in one pair of quotes (Hydra removes them), the list [a.jsonl,b.jsonl] for a key of
    several files, and in a sweep (--multirun) what has a comma, which separates the values of different jobs there.
    """
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    return [_literal(argument, words, sweeps) for argument in arguments]


def _literal(argument: str, words: Collection[str], sweeps: bool) -> str:
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    is_list = name in _LISTS and value.startswith("[") and value.endswith("]") and not Path(value).exists()
    is_swept = sweeps and "," in value and name.startswith(_SWEPT)
    if name not in words or not sign or value == "null" or is_list or is_swept or _QUOTED.fullmatch(value):
        return argument
    return f"{key}={_as_text(value, keep_interpolations=name in _INTERPOLATED)}"


def check_groups(arguments: Sequence[str]) -> None:
    """Raise UserError for a group that is given null or a number: Hydra would end with a traceback."""
    for argument in arguments:
        key, sign, value = argument.partition("=")
        group = key.lstrip("+").partition("@")[0]
        if not sign or not re.fullmatch(r"[a-z_]+(/[a-z_]+)?", group):
            continue
        options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
        names = [yaml.safe_load(name) for name in value.split(",") if re.fullmatch(r"[\w.+-]*", name)]
        if options and any(isinstance(name, _NO_NAME) for name in names):
            raise UserError(f"{group}={value}: must name one of the options in conf/{group}/: {', '.join(options)}")


def quoted(key: str, value: str) -> str:
    """Return `key=value` as an override whose value is exactly these characters."""
    return f"{key}={_as_text(value)}"


def text_of(argument: str) -> str:
    """Return the value of `key=value`, without the quotes that Hydra would remove."""
    value = argument.partition("=")[2]
    if not _QUOTED.fullmatch(value):
        return value
    parsed = OverridesParser.create().parse_override(f"x={value}").value()
    text = parsed.text if isinstance(parsed, QuotedString) else str(parsed)
    return str(OmegaConf.create({"value": text}).value)


def _as_text(value: str, keep_interpolations: bool = False) -> str:
    if not keep_interpolations:
        value = literal_text(value)
    return QuotedString(value, Quote.double).with_quotes()


def _refuse_credentials(cfg: DictConfig) -> None:
    """Refuse a configuration with a credential, and remove what Hydra stored of it: a job of a sweep is composed only there."""
    hydra_config = HydraConfig.get()
    try:
        refuse(cfg)
    except UserError:
        if hydra_config.output_subdir is not None:
            shutil.rmtree(Path(hydra_config.runtime.output_dir) / hydra_config.output_subdir, ignore_errors=True)
        raise


def _located(message: str) -> str:
    """Return an error's message with the file or command line that set the key it names."""
    config = HydraConfig.get()
    folders = [Path(source.path) for source in config.runtime.config_sources if source.schema == "file"]
    return with_origin(message, config.overrides.task, config.runtime.choices, folders)


def _composition_fault(error: Exception) -> str:
    """Return Hydra's message on one line, with the nearest right key if the key is wrong."""
    if isinstance(error, UserError):
        return str(error)  # of a sweep's jobs: a line for each mistake
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigKeyError | ConfigAttributeError):
        cause = cause.__cause__
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = sorted(error.options or (file.stem for file in (CONF_DIR / group).glob("*.yaml")))
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return f"{group}={name}: no such option; {hint}conf/{group}/ has {', '.join(options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        group, _, key = str(cause.full_key).rpartition(".")
        said = unknown(key, [str(name) for name in cause.parent_node], group)
        return (
            f"{said} (a key of the library that no group file has is added with a plus: +{cause.full_key}=...)"
            if group
            else said
        )
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())
