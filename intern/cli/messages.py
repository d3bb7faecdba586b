"""Log records and error messages -> lines without credentials and control characters."""

import logging
import re
import sys

from intern.config.secrets import masked
from intern.display.text import in_lines, visible

_OURS = ("intern", "hydra", "hydra_plugins")
_HYDRAS_JOB = re.compile(r"^\t#(\d+) : ")  # how Hydra's launcher begins the line of a job


class Formatter(logging.Formatter):
    """conf/hydra/job_logging: nothing in a message commands the terminal, begins a line of its own, or shows a credential."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback, which follows it on lines of its own."""
        own = record.name.split(".")[0] in _OURS
        record.message = (
            visible(_HYDRAS_JOB.sub(r"job \1: ", record.message)) if own else record.message.replace("\n", "\n    ")
        )
        return super().formatMessage(record)


def shown(text: str) -> str:
    """Return text for a terminal or a log file: credentials masked, control characters as escapes. Line breaks stay."""
    return in_lines(masked(text))


def say(message: str) -> None:
    """Write a message to standard error, on one line."""
    sys.stderr.write(visible(masked(message)) + "\n")
