"""Errors that a user can mend: shown as one line, without a traceback."""


class UserError(ValueError):
    """Bad input. The message names the key, file or row, what is wrong with it and the remedy, in one line."""


class RunError(RuntimeError):
    """A run that cannot go on although its input is good. The message says what happened and what to do, in one line."""
