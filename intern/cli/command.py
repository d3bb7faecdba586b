"""A task function -> a command: Hydra around it, one line for a user's mistake, exit codes 0 done, 1 failed, 2 bad input, 130 interrupted."""

import contextlib
import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from intern.cli import sweep
from intern.config.suggestions import unknown, with_origin
from intern.errors import RunError, UserError, one_line
from intern.paths import CONF_DIR

log = logging.getLogger(__name__)

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def command(
    config_name: str, free_text: tuple[str, ...] = (), prepare: Callable[[list[str]], list[str]] = list
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: the task becomes a command whose configuration is conf/<config_name>.yaml.

    Args:
        config_name: the primary config.
        prepare: changes the command line before Hydra reads it.
        free_text: keys whose values are a person's words: they need no quoting against Hydra's grammar beyond the shell's.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)
        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            try:
                with _full_errors(
                    "1" if WANTS_TRACEBACK else None
                ):  # processes that the task starts are not Hydra's to tell
                    return task(cfg)
            except Exception as error:  # whatever it is, its traceback belongs into the job's log: nothing is swallowed
                # Said here, where the job's own log file is open.
                if WANTS_TRACEBACK:
                    log.exception("%s", type(error).__name__)
                elif sweep.folder(HydraConfig.get()) is not None:
                    log.error("%s", _located(one_line(error)))
                    sweep.log_file.error("its traceback:", exc_info=error)
                elif isinstance(error, UserError | RunError):
                    log.error("%s", _located(str(error)))
                else:
                    log.exception("%s", type(error).__name__)
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    return sweep.failed(error)  # the other jobs go on
                sys.exit(2 if isinstance(error, UserError) else 1)
            except (KeyboardInterrupt, SystemExit):
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    sweep.stopped(HydraConfig.get())
                raise

        @functools.wraps(task)
        def main() -> None:
            logging.raiseExceptions = False  # a log file on a full disk must not hide what is said about it
            try:
                sys.argv[1:] = prepare([_free(argument, free_text) for argument in sys.argv[1:]])
                with _full_errors("1"):  # Hydra hands its own errors on instead of printing them
                    job()
            except (HydraException, OmegaConfBaseException, UserError) as error:
                if WANTS_TRACEBACK:
                    raise
                sys.stderr.write(_composition_fault(error) + "\n")
                sys.exit(2)
            except OSError as error:
                if WANTS_TRACEBACK:
                    raise
                # The task's own errors are said by its job: this one is of the folder that Hydra makes before.
                sys.stderr.write(
                    f"{error.filename}: cannot be written ({error.strerror}): take another hydra.run.dir\n"
                )
                sys.exit(2)
            except KeyboardInterrupt:
                sys.exit(130)
            if sweep.failures:
                sys.exit(sweep.exit_code())

        return main

    return decorate


@contextlib.contextmanager
def _full_errors(value: str | None) -> Iterator[None]:
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        if value is not None:
            os.environ["HYDRA_FULL_ERROR"] = value
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _free(argument: str, keys: tuple[str, ...]) -> str:
    """`question=What's up, Uber?` as Hydra takes it; a value that is quoted already, or null, stays as it is."""
    key, sign, value = argument.partition("=")
    if (
        key not in keys
        or not sign
        or value == "null"
        or (len(value) > 1 and value[0] == value[-1] and value[0] in "\"'")
    ):
        return argument
    return quoted(key, value)


def quoted(key: str, value: str) -> str:
    """`key=value` as an override that means these characters and nothing else."""
    return f"{key}={QuotedString(value.replace('${', chr(92) + '${'), Quote.double).with_quotes()}"


def _located(message: str) -> str:
    """An error's message, with the file or command line that set the key which it names."""
    config = HydraConfig.get()
    folders = [Path(source.path) for source in config.runtime.config_sources if source.schema == "file"]
    return with_origin(message, config.overrides.task, config.runtime.choices, folders)


def _composition_fault(error: Exception) -> str:
    """Hydra's message on one line, with the nearest right key where the key is wrong."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigKeyError | ConfigAttributeError):
        cause = cause.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        near = difflib.get_close_matches(name, error.options, n=1)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return f"{group}={name}: no such option; {hint}conf/{group}/ has {', '.join(sorted(error.options))}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        group, _, key = str(cause.full_key).rpartition(".")
        said = unknown(key, [str(name) for name in cause.parent_node], group)
        return (
            f"{said} (a key of the library that no group file has is added with a plus: +{cause.full_key}=...)"
            if group
            else said
        )
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())
