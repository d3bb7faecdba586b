"""Files of a run directory -> bytes, and bytes -> files: the one place that opens them.

A run directory may come from someone else, and it must not make a command read or write anything outside of it. So each part of a path
below the run is opened without following links, only regular files are opened, no more is read than the caller allows, and a file is
replaced by renaming a new one that was written next to it.
"""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from intern.errors import UserError
from intern.units import MIB

_DEEPEST = 16  # folders below the run directory
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_CALM = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe without a writer would block


def read_bytes(path: Path, root: Path, most: int) -> bytes:
    """Return the content of a file of a run.

    Args:
        path: the file, below `root`.
        root: the run directory.
        most: size in bytes beyond which the file is refused.

    Raises:
        UserError: it is a link, no regular file, outside of the run, or too large.
        OSError: it does not exist or cannot be read.
    """
    with open_file(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:  # it may have grown meanwhile
        raise UserError(
            f"{path}: {size / MIB:,.0f} MiB, and nothing that training writes there is larger than {most / MIB:g} MiB: refused"
        )
    return content


@contextlib.contextmanager
def open_file(path: Path, root: Path) -> Iterator[io.BufferedReader]:
    """Open a file of a run for reading. Raises what `read_bytes` raises."""
    with _parent(path, root) as folder, os.fdopen(_open(path, os.O_RDONLY | _CALM, folder), "rb") as file:
        yield file


def exists(path: Path, root: Path) -> bool:
    """Return whether a run has this regular file.

    Raises:
        UserError: there is something else, such as a link, a pipe or a folder, or the path leads out of the run.
    """
    try:
        check_file(path, root)
    except OSError:
        return False
    return True


def check_file(path: Path, root: Path) -> int:
    """Check a file that a library will open by its path, and return its size in bytes. Raises what `read_bytes` raises."""
    with _parent(path, root) as folder:
        found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    _check_kind(path, found)
    return found.st_size


def check_folder(path: Path, root: Path, is_written: bool = False) -> list[str]:
    """Check that a folder and everything in it are neither links nor special files; return the sorted names in it.

    Args:
        path: the folder, below `root`.
        root: the run directory.
        is_written: refuse hard links too: writing to such a file would change the other one.

    Raises:
        UserError: names what is a link or special, or the path leads out of the run.
        OSError: it does not exist or cannot be read.
    """
    with _opened(path, root) as folder, os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
        for name in names:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                _check_kind(path / name, found)
                if is_written and found.st_nlink > 1:
                    raise UserError(f"{path / name}: is a hard link: writing to it would change the other file")
    return names


def list_files(path: Path, root: Path) -> dict[str, int]:
    """Return the sizes in bytes of all files in a folder and the folders in it, by their paths relative to the folder, sorted.

    An empty folder has a slash at the end of its path, and size 0.

    Raises:
        UserError: names what is neither a regular file nor a folder; the path leads out of the run, or deeper than any that training makes.
        OSError: it does not exist or cannot be read.
    """
    if len(_parts(path, root)) > _DEEPEST:
        raise UserError(f"{path}: is nested deeper than {_DEEPEST} folders: refused")
    sizes: dict[str, int] = {}
    with _opened(path, root) as folder, os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                inside = list_files(path / name, root) or {"": 0}
                sizes |= {f"{name}/{inner}": size for inner, size in inside.items()}
            else:
                _check_kind(path / name, found)
                sizes[name] = found.st_size
    return sizes


def make_folder(path: Path, root: Path) -> None:
    """Create a folder of a run with the folders around it; raise UserError if one of them is a link or a file."""
    parts = _parts(path, root)
    root.mkdir(parents=True, exist_ok=True)
    for count in range(1, len(parts) + 1):
        folder = root.joinpath(*parts[:count])
        with _parent(folder, root) as parent, contextlib.suppress(FileExistsError):
            os.mkdir(folder.name, dir_fd=parent)
    with _opened(path, root):
        pass


def write_bytes(path: Path, root: Path, content: bytes) -> None:
    """Write a file of a run, complete or not at all.

    Raises:
        UserError: there is a link or something else than a file in its place, or the path leads out of the run.
        OSError: it cannot be written; a former file stays.
    """
    with replace_file(path, root) as file:
        file.write(content)


def write_text(path: Path, root: Path, text: str) -> None:
    """Write a text file in UTF-8, as `write_bytes` does."""
    write_bytes(path, root, text.encode("utf-8"))


@contextlib.contextmanager
def replace_file(path: Path, root: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` at the end; an exception inside leaves the former file. Raises as `write_bytes`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with _parent(path, root) as folder:
        with contextlib.suppress(FileNotFoundError):
            _check_kind(path, os.stat(path.name, dir_fd=folder, follow_symlinks=False))
        try:
            with contextlib.suppress(FileNotFoundError):  # left by a killed process with this number
                os.unlink(draft.name, dir_fd=folder)
            with os.fdopen(_open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CALM, folder), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename in (None, draft.name):
                error.filename = str(path)  # what a message should name
            with contextlib.suppress(OSError):
                os.unlink(draft.name, dir_fd=folder)
            raise


def append_text(path: Path, root: Path, text: str) -> None:
    """Append to a text file of a run, which is created if there is none. Raises as `write_bytes`."""
    with open_to_append(path, root) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def open_to_append(path: Path, root: Path) -> Iterator[BinaryIO]:
    """Open a file of a run to append to it. Raises as `write_bytes`."""
    with contextlib.suppress(FileNotFoundError), open_file(path, root) as former:
        if os.fstat(former.fileno()).st_nlink > 1:  # a hard link: appending would change the other file too
            content = former.read()
            write_bytes(path, root, content)
    with (
        _parent(path, root) as folder,
        os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CALM, folder), "ab") as file,
    ):
        yield file


def rename(path: Path, root: Path, name: str) -> None:
    """Give a file or folder of a run another name in the folder where it is; raise UserError if the path leads through a link."""
    with _parent(path, root) as folder:
        os.rename(path.name, name, src_dir_fd=folder, dst_dir_fd=folder)


def remove_file(path: Path, root: Path) -> None:
    """Remove a file of a run, or a link itself, if there is one; raise UserError if the path leads through a link."""
    with contextlib.suppress(FileNotFoundError), _parent(path, root) as folder:
        os.unlink(path.name, dir_fd=folder)


@contextlib.contextmanager
def _parent(path: Path, root: Path) -> Iterator[int]:
    """Open the folder that `path` is in."""
    if not _parts(path, root):
        raise UserError(f"{path}: is the run directory itself")
    with _opened(path.parent, root) as folder:
        yield folder


@contextlib.contextmanager
def _opened(path: Path, root: Path) -> Iterator[int]:
    """Open a folder of a run, one part after the other; `root` itself was chosen by the user and may be a link."""
    folder, place = os.open(root, os.O_RDONLY | os.O_DIRECTORY), root
    try:
        for part in _parts(path, root):
            place = place / part
            inner = _open_folder(place, folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _open_folder(path: Path, parent: int) -> int:
    try:
        return os.open(path.name, _FOLDER, dir_fd=parent)
    except OSError:
        found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            raise UserError(f"{path}: is a link: links of a run directory are not followed") from None
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path}: is not a folder") from None
        raise


def _open(path: Path, flags: int, folder: int) -> int:
    with contextlib.suppress(FileNotFoundError):  # before it is opened: opening a device may do something
        _check_kind(path, os.stat(path.name, dir_fd=folder, follow_symlinks=False))
    file = os.open(path.name, flags, 0o666, dir_fd=folder)
    try:
        _check_kind(path, os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return file


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise UserError(f"{path}: is a link: links of a run directory are not followed")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is not a regular file")


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ("..",)
    if ".." in parts or any("\0" in part for part in parts):
        raise UserError(f"{path}: leads out of {root}")
    return parts
