"""What data.train_file and data.eval_file name -> one dataset of checked rows: files, globs, folders, datasets of the hub, mixtures."""

import contextlib
import glob
import hashlib
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.data_files import get_data_patterns, resolve_pattern

from intern.data.files import FORM, ROW, DataFile, quiet, read_file, writing_the_cache
from intern.data.formats import Layout, conversation_row, detect
from intern.data.settings import HUB, DataConfig
from intern.errors import UserError
from intern.paths import PROJECT, find

_BATCH = 1_000  # rows hashed at a time
_SAVED = ("dataset_dict.json", "state.json")  # in a folder that `datasets` has saved
_TABLE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|gzip|zst|zstd))?$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One place that rows come from."""

    name: str  # a path, or hub:owner/name
    file: DataFile | None  # None: a folder or a dataset of the hub, read by `datasets`
    entry: int  # which entry of data.train_file it belongs to


@dataclass(frozen=True)
class RowSet:
    """Checked rows, and where they come from."""

    name: str  # "train.jsonl", "3 files": what messages call them
    rows: Dataset  # with the columns of files.ROW
    files: tuple[DataFile, ...]
    starts: tuple[int, ...]  # what was added to the row numbers of each file
    formats: tuple[str, ...]  # "qa (question: Frage, answer: Antwort)", each one once
    part: str = ""  # which rows of the files it has, if not all of them

    @property
    def file(self) -> DataFile:
        """The only file, or what stands for several or for a part of one: its name, and a hash of all that it depends on."""
        if len(self.files) == 1 and not self.part:
            return self.files[0]
        digest = hashlib.sha256(json.dumps([self.part, *(file.sha256 for file in self.files)]).encode()).hexdigest()
        return DataFile(Path(self.name), digest)

    def place(self, row: int) -> str:
        """Where a row is: "train.jsonl:17"."""
        index = bisect_left(self.starts, row) - 1
        return f"{self.files[index].path.name}:{row - self.starts[index]}"


def locate(names: Sequence[str], key: str) -> list[Source]:
    """Find what the entries of a data key name, without reading it.

    Args:
        names: paths, globs, folders and hub:owner/name.
        key: "data.train_file", for messages.

    Raises:
        UserError: an entry that names nothing.
    """
    sources = []
    for entry, name in enumerate(names):
        if name.startswith(HUB):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name.removeprefix(HUB)):
                raise UserError(f"{key}={name}: a dataset of the hub is named hub:owner/name")
            sources.append(Source(name, None, entry))
            continue
        found = find(name)
        if found is not None and found.is_dir():
            sources.append(Source(str(found), None, entry))
        elif found is None and glob.has_magic(name):
            matches = _matches(name)
            if not matches:
                raise UserError(f"{key}={name}: no file matches, neither in the working directory nor in the project")
            sources += [Source(str(path), DataFile.find(str(path), key), entry) for path in matches]
        else:
            try:
                sources.append(Source(name, DataFile.find(name, key), entry))
            except UserError as error:
                if found is None and re.fullmatch(r"[\w-]+/[\w-]+", name):
                    raise UserError(f"{error}; a dataset of the hub is named hub:{name}") from error
                raise
    return sources


def read_sources(sources: Sequence[Source], data: DataConfig, training: bool) -> RowSet:
    """Read and check the rows of all sources, one after another; those of each file are cached by its content.

    Args:
        sources: as `locate` found them.
        data: how rows are read, how many of them, and the weights of a mixture.
        training: whether they are training rows, which alone are mixed and limited; decides the split of folders and datasets of the hub.

    Raises:
        UserError: naming file and row, if a row is not as it must be.
        RunError: the cache cannot be written.
    """
    split = data.split if training else data.eval_split
    files: list[DataFile] = []
    starts: list[int] = []
    found: list[str] = []
    entries: dict[int, list[Dataset]] = {}
    first = 0
    for source in _unfolded(sources, data, split):
        if source.file is not None:
            file = source.file
            rows, description = read_file(file, data.rows, first)
        else:
            file, rows, description = _read_dataset(source.name, data, split, first)
        files.append(file)
        starts.append(first)
        found.append(description)
        entries.setdefault(source.entry, []).append(rows)
        first = int(rows[-1]["row"])
    with quiet(True), writing_the_cache():
        mixed = [concatenate_datasets(parts) if len(parts) > 1 else parts[0] for parts in entries.values()]
        if data.weights is not None and training:
            mixed = _mixture(mixed, data.weights, data.seed)
        rows = concatenate_datasets(mixed) if len(mixed) > 1 else mixed[0]
        if data.max_rows is not None and training:
            rows = rows.select(range(min(data.max_rows, len(rows))))
    only = str(files[0].path)
    name = f"{len(files)} files" if len(files) > 1 else only if only.startswith(HUB) else files[0].path.name
    return RowSet(name, rows, tuple(files), tuple(starts), tuple(dict.fromkeys(found)))


def _mixture(parts: list[Dataset], weights: Sequence[float], seed: int) -> list[Dataset]:
    """Draw from each part so many rows that they are in proportion to the weights: no row twice, and one part whole."""
    most = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    draw = np.random.default_rng(seed)
    mixed = []
    for part, weight in zip(parts, weights, strict=True):
        count = min(max(round(most * weight), 1), len(part))
        mixed.append(part.select(np.sort(draw.permutation(len(part))[:count])))
    return mixed


def absolute(name: str) -> str:
    """An entry of data.train_file that means the same from every working directory."""
    if name.startswith(HUB):
        return name
    if (found := find(name)) is not None:
        return str(found)
    pattern = Path(name).expanduser()
    return str(pattern if pattern.is_absolute() else _base(name) / pattern)


def _base(pattern: str) -> Path:
    """Where a glob is looked up: in the working directory, or in the project if nothing matches there."""
    return Path.cwd() if any(glob.iglob(pattern, root_dir=Path.cwd(), recursive=True)) else PROJECT  # noqa: PTH207  # may be absolute


def _matches(pattern: str) -> list[Path]:
    """The files that a glob matches, sorted."""
    pattern = str(Path(pattern).expanduser())
    base = _base(pattern)
    found = sorted(glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207  # may be absolute
    return [base / one for one in found if (base / one).is_file()]


# --- Folders of tables ---


def _unfolded(sources: Sequence[Source], data: DataConfig, split: str) -> Iterator[Source]:
    """Yield the sources with the files of a folder of tables in its place: our reader knows more forms and names the row of a fault."""
    for source in sources:
        is_folder = source.file is None and not source.name.startswith(HUB)
        files = _tables(Path(source.name), data, split) if is_folder else []
        for file in files:
            yield Source(str(file), DataFile.find(str(file), "data.train_file"), source.entry)
        if not files:
            yield source


def _tables(folder: Path, data: DataConfig, split: str) -> list[Path]:
    """Return the files of a split, told by their names as `datasets` does; empty if the folder is for its own reader.

    Raises:
        UserError: the folder's files belong to other splits.
    """
    card = folder / "README.md"
    has_configs = card.is_file() and card.read_bytes().startswith(b"---")
    if data.subset is not None or data.streaming or has_configs or any((folder / name).is_file() for name in _SAVED):
        return []
    try:
        patterns = get_data_patterns(str(folder))
    except (FileNotFoundError, OSError):  # no file that could hold data: the library's reader says so
        return []
    names_no_split = list(patterns.values()) == [["**"]]
    if not names_no_split and split not in patterns:
        raise UserError(
            f"{folder}: has no file of the split {split}, but of {', '.join(map(str, patterns))}: set data.split or data.eval_split"
        )
    chosen = next(iter(patterns.values())) if names_no_split else patterns[split]
    matched: set[Path] = set()
    for pattern in chosen:
        with contextlib.suppress(FileNotFoundError):  # of a split's patterns, only one need match
            matched.update(map(Path, resolve_pattern(pattern, str(folder))))
    found = sorted(matched)
    tables = [path for path in found if _TABLE.search(path.name)]
    return tables if len(tables) == len(found) else []


# --- Folders that `datasets` has saved, and datasets of the hub ---


def _read_dataset(name: str, data: DataConfig, split: str, first: int) -> tuple[DataFile, Dataset, str]:
    raw = _load(name, data, split)
    if not len(raw):
        raise UserError(f"{name}: split {split} has no rows")
    layout = detect(raw[0], data.rows, f"{name}: row 1")
    file = DataFile(Path(name), _content_hash(raw))
    key = [file.sha256, layout.format.name, dict(data.columns or {}), data.rows.needs_context, first, layout.format.identity, FORM]  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "intern_rows"
    with quiet(len(raw) < _BATCH), writing_the_cache():
        folder.mkdir(parents=True, exist_ok=True)
        rows = raw.map(
            _checked,
            with_indices=True,
            fn_kwargs={"layout": layout, "name": name, "first": first},
            remove_columns=raw.column_names,
            features=ROW,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"reading {name}",
        )
    return file, rows, layout.describe(raw[0])


def _checked(row: dict[str, Any], index: int, layout: Layout, name: str, first: int) -> dict[str, Any]:
    return {"row": first + index + 1} | conversation_row(layout, row, f"{name}: row {index + 1}")


def _load(name: str, data: DataConfig, split: str) -> Dataset:
    """The raw rows of a folder or a dataset of the hub.

    Raises:
        UserError: no such dataset, split or subset, or the hub cannot be reached.
    """
    path = name.removeprefix(HUB)
    with quiet(not name.startswith(HUB)):
        try:
            if any((Path(path) / one).is_file() for one in _SAVED):
                saved = load_from_disk(path)
                if isinstance(saved, DatasetDict):
                    if split not in saved:
                        raise ValueError(f"unknown split {split!r}; it has {', '.join(saved)}")
                    return saved[split]
                return saved
            if data.streaming:
                return _streamed(path, data, split)
            return load_dataset(path, data.subset, split=split, revision=data.revision)
        except UserError:
            raise
        except Exception as error:  # the library raises many kinds: which dataset it was belongs to each of them
            reason = " ".join(str(error).split())[:300]
            key = "data.split" if split == data.split else "data.eval_split"
            raise UserError(
                f"{name}: cannot be loaded ({type(error).__name__}: {reason}): look at the name, data.subset={data.subset}, "
                f"{key}={split}, data.revision={data.revision}, and the network"
            ) from error


def _streamed(path: str, data: DataConfig, split: str) -> Dataset:
    """The first data.max_rows rows of a dataset, without downloading the others."""
    stream = load_dataset(path, data.subset, split=split, revision=data.revision, streaming=True)
    return Dataset.from_generator(
        _taken, features=stream.features, gen_kwargs={"stream": stream, "count": data.max_rows}
    )


def _taken(stream: Any, count: int) -> Iterator[dict[str, Any]]:
    yield from itertools.islice(stream, count)


def _content_hash(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(_BATCH):
        digest.update(json.dumps(table.to_pylist(), default=str).encode())
    return digest.hexdigest()
