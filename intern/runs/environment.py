"""What a run was made with: versions, hardware, code and data, for environment.json."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from intern.config.secrets import masked
from intern.data.files import DataFile
from intern.paths import PROJECT
from intern.units import GIB

_PACKAGES = (
    "intern",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "wandb",
)


def describe(files: list[DataFile]) -> dict[str, Any]:
    """Return versions, the machine, the code's git commit (None outside a checkout) and the SHA-256 of the data files."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpu": _gpu(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "git": _git(),
        "data": {str(file.path): file.sha256 for file in files},
        "command": [masked(argument) for argument in sys.argv],
    }


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in GiB.

    On the host it is the resident set, including pages of the model's mapped files, which the system can evict. On a GPU it is the
    memory of tensors, and the memory that was reserved for them.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = {"peak_host_rss_gib": round(host / GIB, 2)}
    if torch.cuda.is_available():
        peak["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        peak["peak_gpu_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return peak


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _git() -> dict[str, Any] | None:
    if not (PROJECT / ".git").exists():  # installed: a repository around it would be that of another project
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
