"""The doctor's checks of room: GPU memory, host memory, disk, and whether the run directory can be written."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intern.hardware import available_memory
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.doctor_pieces import DoctorPieces, SkippedError
from intern.inspection.installation import existing
from intern.memory.estimate import TrainingPeak, datasets_cache, host_memory, run_directory
from intern.paths import find
from intern.units import GIB

if TYPE_CHECKING:
    from intern.data.settings import DataConfig

TIGHT = 0.9  # fraction of the free memory above which an estimate may well be wrong


def check_gpu_memory(pieces: DoctorPieces) -> Check:
    """Compare an estimate of the training step with the free memory of the GPU."""
    if pieces.on_cpu:
        return Check("GPU memory", GREEN, "not needed: trainer.use_cpu=true")
    base, peak = pieces.known("base", "model"), _peak(pieces)
    import torch

    from intern.model.sizes import check_fit

    chosen = pieces.trainer.get("activation_checkpointing")
    least = peak.kept if chosen is False else peak.recomputed
    found = f"about {least / GIB:.1f} GiB needed" + (
        f" ({peak.kept / GIB:.1f} if no layer recomputes its activations)" if chosen == "auto" else ""
    )
    if not torch.cuda.is_available():
        return Check("GPU memory", AMBER, f"{found}; there is no GPU to compare with", "fix GPU first")
    check_fit(base, pieces.quant, pieces.known("precision", "precision"))
    cap = torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction()
    return _fits("GPU memory", found, least, min(torch.cuda.mem_get_info()[0], cap), smaller(chosen))


def check_host_memory(pieces: DoctorPieces) -> Check:
    """Compare an estimate of what loading and training take with the free memory of the host."""
    peak = None
    if pieces.on_cpu:
        from intern.model.sizes import check_fit

        check_fit(pieces.known("base", "model"), pieces.quant, pieces.known("precision", "precision"))
        peak = _peak(pieces)
    need = host_memory(pieces.on_cpu, peak)
    return _fits("host memory", f"about {need / GIB:.1f} GiB needed", need, available_memory(), "close other programs")


def check_disk(pieces: DoctorPieces) -> Check:
    """Check the room for download, datasets cache and run; what shares a file system is added up."""
    import datasets
    from huggingface_hub import constants

    needs: dict[Path, list[tuple[str, float]]] = {}

    def add(path: str | Path, name: str, size: float) -> None:
        needs.setdefault(existing(Path(path)), []).append((name, size))

    with contextlib.suppress(SkippedError):  # what cannot be known has a line of its own
        if size := pieces.known("download", "weights"):
            add(constants.HF_HUB_CACHE, "download", size)
    with contextlib.suppress(SkippedError):
        data = pieces.known("data", "configuration")
        add(datasets.config.HF_DATASETS_CACHE, "datasets cache", datasets_cache(data_bytes(data)))
    with contextlib.suppress(SkippedError):
        trainable = pieces.known("adapted", "adapter").get_nb_trainable_parameters()[0]
        size = run_directory(
            trainable, pieces.state_bytes, pieces.known("configured_args", "configuration").save_total_limit
        )
        add(pieces.cfg.run_dir, "run directory", size)
    systems: dict[int, list[tuple[Path, str, float]]] = {}
    for path, parts in needs.items():
        systems.setdefault(path.stat().st_dev, []).extend((path, *part) for part in parts)
    if not systems:
        raise SkippedError("configuration, model")
    lines, full = [], False
    for entries in systems.values():
        need, free = sum(size for _, _, size in entries), shutil.disk_usage(entries[0][0]).free
        full |= need > free
        listed = ", ".join(f"{amount(size)} {name}" for _, name, size in entries)
        lines.append(f"about {listed}; {amount(free)} free")
    remedy = "free some space, or use another disk: HF_HOME moves the caches, hydra.run.dir the run" if full else ""
    return Check("disk", RED if full else GREEN, "; ".join(lines), remedy)


def check_run_directory(pieces: DoctorPieces) -> Check:
    """Check that the run directory can be written."""
    path = Path(pieces.cfg.run_dir)
    if os.access(existing(path), os.W_OK | os.X_OK):
        return Check("run directory", GREEN, f"{path} is writable")
    return Check(
        "run directory",
        RED,
        f"{path}: no permission to write in {existing(path)}",
        "choose another folder with hydra.run.dir",
    )


def _peak(pieces: DoctorPieces) -> TrainingPeak:
    pieces.known("adapted", "adapter")
    pieces.known("configured_args", "configuration")
    return pieces.peak


def _fits(name: str, found: str, need: float, free: float, remedy: str) -> Check:
    found += f", {free / GIB:.1f} free"
    if need > free:
        return Check(name, RED, found, remedy)
    return Check(name, AMBER, f"{found}: tight", remedy) if need > TIGHT * free else Check(name, GREEN, found)


def smaller(checkpointing: Any) -> str:
    """Return what to change so that a step needs less GPU memory.

    Args:
        checkpointing: trainer.activation_checkpointing.
    """
    least = "trainer.activation_checkpointing=auto, or " if checkpointing is False else ""
    return f"{least}lower trainer.per_device_train_batch_size, then trainer.max_length"


def data_bytes(data: "DataConfig") -> int:
    """Return the bytes of the training and golden files."""
    return sum(_size(path) for path in (*data.train_files, *data.eval_files))


def _size(path: str) -> int:
    found = find(path)
    return found.stat().st_size if found is not None and found.is_file() else 0


def amount(size: float) -> str:
    """Return a size in words: "1.2 GiB", "31 MiB"."""
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.0f} MiB"
