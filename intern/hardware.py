"""What this machine's hardware is: host memory, GPU generation, driver."""

import contextlib
import re
import subprocess
from pathlib import Path

_NVIDIA_SMI_TIMEOUT_S = 10


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of host memory that this process may still use: the system's, or its container's if that is less.

    Args:
        groups: where control groups are mounted (version 1 or 2).
    """
    import psutil

    free = [psutil.virtual_memory().available]
    version_2 = groups / "memory.max", groups / "memory.current"
    version_1 = groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"
    for most, used in (version_2, version_1):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max": no limit
            free.append(int(most.read_text()) - int(used.read_text()))
    return min(free)


def runs_architectures(major: int, minor: int, built: list[str]) -> bool:
    """Whether a GPU runs code that was built for some architectures.

    Binaries run on GPUs of the same major version from their minor version on, PTX on all GPUs from its version on.

    Args:
        major, minor: the GPU's compute capability.
        built: architectures, such as "sm_80" (a binary) or "compute_90" (PTX).
    """
    for name in built:
        kind, _, digits = name.partition("_")
        number = int(re.sub(r"\D", "", digits))
        if kind == "compute" and number <= 10 * major + minor:
            return True
        if kind == "sm" and number // 10 == major and number % 10 <= minor:
            return True
    return False


def is_hopper() -> bool:
    """Whether the GPU is of the generation of an H100."""
    import torch  # not at the top: callers that need none of it should not wait for it

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is none."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            line, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
