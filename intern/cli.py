"""A task function -> a command: Hydra around it, one line for a user's mistake, exit codes 0 done, 1 failed, 2 bad input, 130 interrupted."""

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from intern import sweep
from intern.errors import RunError, UserError, one_line
from intern.paths import CONF_DIR

log = logging.getLogger(__name__)

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # asked before main() sets it for Hydra's own errors


def command(
    config_name: str, free_text: tuple[str, ...] = ()
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: the task becomes a command whose configuration is conf/<config_name>.yaml.

    Args:
        config_name: the primary config.
        free_text: keys whose values are a person's words: they need no quoting against Hydra's grammar beyond the shell's.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)
        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            try:
                return task(cfg)
            except Exception as error:  # whatever it is, its traceback belongs into the job's log: nothing is swallowed
                # Said here, where the job's own log file is open.
                if WANTS_TRACEBACK:
                    log.exception("%s", type(error).__name__)
                elif sweep.folder(HydraConfig.get()) is not None:
                    log.error("%s", one_line(error))
                    sweep.log_file.error("its traceback:", exc_info=error)
                elif isinstance(error, UserError | RunError):
                    log.error("%s", error)
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
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its own errors on instead of printing them
            sys.argv[1:] = [_quoted(argument, free_text) for argument in sys.argv[1:]]
            try:
                job()
            except (HydraException, OmegaConfBaseException, UserError) as error:
                if WANTS_TRACEBACK:
                    raise
                sys.stderr.write(_composition_fault(error) + "\n")
                sys.exit(2)
            except KeyboardInterrupt:
                sys.exit(130)
            if sweep.failures:
                sys.exit(sweep.exit_code())

        return main

    return decorate


def _quoted(argument: str, keys: tuple[str, ...]) -> str:
    """`question=What's up, Uber?` as Hydra takes it; a value that is quoted already, or null, stays as it is."""
    key, sign, value = argument.partition("=")
    if (
        key not in keys
        or not sign
        or value == "null"
        or (len(value) > 1 and value[0] == value[-1] and value[0] in "\"'")
    ):
        return argument
    return f"{key}={QuotedString(value.replace('${', chr(92) + '${'), Quote.double).with_quotes()}"


def _composition_fault(error: Exception) -> str:
    """Hydra's message on one line, with the nearest right key where the key is wrong."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigKeyError | ConfigAttributeError):
        cause = cause.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        known = [str(key) for key in cause.parent_node]
        return f"{cause.full_key}: {unknown(str(cause.key), known)}; a library's key that is in no group file is added with a plus: +{cause.full_key}=..."
    return re.sub(r"\s*\n\s*", "; ", str(error).strip())


def unknown(key: str, known: list[str]) -> str:
    """What to say of a key that is not among the known ones: "unknown key 'rr', did you mean 'r'?"."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}")
