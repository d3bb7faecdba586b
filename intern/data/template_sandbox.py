"""A function that runs someone else's program -> the text that it returns, in bounded time and memory.

A chat template is a program that comes with a model. It runs in a child of this process, which the system ends when it has used its time: a
loop inside a single operation, such as a power of large numbers, cannot be stopped in any other way.
"""

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from intern.errors import UserError
from intern.units import GIB

_CPU_S = 0.8  # seconds of computing; a template takes milliseconds
_WALL_S = 60.0  # seconds on a machine that has other things to do
_MEMORY = GIB  # bytes beyond what this process has
_LONGEST = 64 * 1024  # bytes of text: a template renders a few short messages here


class ProgramError(ValueError):
    """What the program raised, as text."""


def bounded_text(run: Callable[[], str], what: str) -> str:
    """Return what `run` returns.

    Args:
        run: the program.
        what: names it in errors.

    Raises:
        ProgramError: `run` raised an exception.
        UserError: it takes too much time or memory, or returns too much text.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(run, writer)
    os.close(writer)
    try:
        reply = _read(reader)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kind, text = reply[:1], reply[1:].decode("utf-8", "surrogateescape" if len(reply) > _LONGEST else "surrogatepass")
    if kind == b"T" and len(reply) <= _LONGEST:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"{what} renders half characters (lone surrogates), which are no text: take another model or template"
            )
        return text
    if kind == b"E":
        raise ProgramError(text)
    reason = {b"M": "memory", b"T": "text"}.get(kind, "time")
    raise UserError(f"{what} takes too much {reason} for two short turns: take another model")


def _read(reader: int) -> bytes:
    """Return what the child wrote until it ended, or as much as is allowed."""
    reply = bytearray()
    end = time.monotonic() + _WALL_S
    while len(reply) <= _LONGEST:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        part = os.read(reader, 1 << 16) if ready else b""
        if not part:
            break
        reply += part
    return bytes(reply)


def _work(run: Callable[[], str], writer: int) -> None:
    """Run the program in the child, write its result, and end without what the parent would do at its end."""
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process at once
        signal.setitimer(signal.ITIMER_PROF, _CPU_S)
        with contextlib.suppress(OSError, ValueError):  # a system without /proc has no limit of memory
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
        try:
            reply = b"T" + run().encode("utf-8", "surrogatepass")
        except MemoryError:
            reply = b"M"
        except Exception as error:  # whatever the program raises is its result
            reply = b"E" + f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "surrogatepass")
        sent = 0
        while sent < len(reply):
            sent += os.write(writer, reply[sent : sent + (1 << 16)])
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
