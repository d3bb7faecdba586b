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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from intern.cli import sweep
from intern.cli.arguments import WORDS, check_arguments, check_groups, command_keys, literal
from intern.cli.help import help_text
from intern.cli.messages import say
from intern.cli.start import remove_unused
from intern.config.secrets import refuse, refuse_arguments
from intern.config.suggestions import unknown, with_origin
from intern.errors import RunError, UserError, one_line
from intern.paths import CONF_DIR
from intern.runs.disk import unwritable

log = logging.getLogger(__name__)

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
                check_arguments(sys.argv[1:], words, command_keys(config_name))
                sys.argv[1:] = prepare(literal(sys.argv[1:], words))
                with _full_errors("1"):  # Hydra raises its own errors instead of printing them
                    job()
            except (HydraException, OmegaConfBaseException, UserError) as error:
                if WANTS_TRACEBACK:
                    raise
                say(_composition_fault(error, command_keys(config_name)))
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


def _composition_fault(error: Exception, keys: Collection[str] = ()) -> str:
    """Return Hydra's message on one line, with the nearest right key if the key is wrong; `keys` are the command's at the top level."""
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
        known = {str(name) for name in cause.parent_node}
        said = unknown(key, sorted(known if group else known | set(keys)), group)
        return (
            f"{said} (a key of the library that no group file has is added with a plus: +{cause.full_key}=...)"
            if group
            else said
        )
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())
