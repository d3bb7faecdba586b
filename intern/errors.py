"""Errors that a user can fix: shown as one line, without a traceback."""


class UserError(ValueError):
    """Bad input. The message names the key, file or row, what is wrong with it and the remedy, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # a value that it shows may be text of several lines


class BusyError(UserError):
    """A run directory in which another process is at work."""


class RunError(RuntimeError):
    """A run that cannot go on although its input is good. The message says what happened and what to do, in one line."""


class LostProcess(RunError):
    """Another process of the same run has ended, so this one cannot go on. Why is in the other's own message."""


def one_line(error: BaseException) -> str:
    """An error's message on one line; the name of its class before it where the message alone was not written for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {text}".rstrip(": ")
