"""What this machine's hardware is: host memory, GPU generation, driver."""

import contextlib
import re
import subprocess
from pathlib import Path

_TIMEOUT = 10  # seconds that nvidia-smi may take


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still take: the system's, or a container's (its control group's) where that is less."""
    import psutil

    free = [psutil.virtual_memory().available]
    version_2 = groups / "memory.max", groups / "memory.current"
    version_1 = groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"
    for most, used in (version_2, version_1):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max": no limit
            free.append(int(most.read_text()) - int(used.read_text()))
    return min(free)


def runs_architectures(major: int, minor: int, built: list[str]) -> bool:
    """Whether code for these architectures runs: binaries within a major version from their minor on, PTX from its version on."""
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
    import torch  # not at the top: whoever needs none of it should not wait for it

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=_TIMEOUT).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
