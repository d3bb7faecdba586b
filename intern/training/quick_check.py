"""A composed configuration -> the mistakes that can be found in a fraction of a second, before torch and the other libraries load.

Nothing is decided here: every check comes again, with the same words, when the training plan is built. Only then are values checked that
depend on a library.
"""

import ctypes
import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from intern.config.build import plain
from intern.errors import UserError
from intern.paths import find
from intern.training.rules import RANGES, check_values, top_level

NO_GPU = "no CUDA GPU found, and trainer.use_cpu is false: experiment=tiny_cpu runs everything on a CPU"
NO_FILE = "no such file, neither in the working directory nor in the project"
_HUB = "hub:"  # begins the name of a dataset on the hub
_FRACTIONS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")  # of all steps, if below 1
_WHOLE = (
    "lora.r",
    "trainer.max_steps",
    *(key for key in RANGES if key.endswith(("_steps", "_size", "_length", "_workers", "_limit", "num_proc"))),
)


def check_quickly(cfg: DictConfig, asks_gpu: bool) -> None:
    """Check values, data files and the GPU without importing a heavy library.

    Args:
        cfg: the composed conf/train.yaml, or a configuration that is built on it.
        asks_gpu: whether the command needs the GPU that it is configured for.

    Raises:
        UserError: the first mistake that is found.
    """
    values = {
        name: value for name, value in plain(cfg).items() if name in top_level()
    }  # without the command's own keys
    _check_types(values)
    check_values(values, without_libraries=True)
    _check_files(values)
    trainer = values.get("trainer")
    if asks_gpu and isinstance(trainer, Mapping) and not trainer.get("use_cpu") and not _may_have_gpu():
        raise UserError(NO_GPU)


def _check_types(values: dict[str, Any]) -> None:
    """Raise UserError for text where a number must be."""
    for key in (*RANGES, "trainer.max_steps"):
        group, _, name = key.partition(".")
        value = group_values.get(name) if isinstance(group_values := values.get(group), Mapping) else None
        if isinstance(value, str) and not _is_number(value):
            whole = key in _WHOLE and name not in _FRACTIONS
            raise UserError(f"{key}={value!r}: must be a {'whole ' if whole else ''}number")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_files(values: dict[str, Any]) -> None:
    """Raise UserError for a data file that is named by its path and is not there."""
    group = values.get("data")
    data: Mapping[str, Any] = group if isinstance(group, Mapping) else {}
    for key in ("train_file", "eval_file"):
        for name in _names(data.get(key)):
            if find(name) is None and not glob.has_magic(name) and not name.startswith(_HUB):
                hint = f"; a dataset of the hub is named {_HUB}{name}" if _may_be_of_the_hub(name) else ""
                raise UserError(f"data.{key}={name}: {NO_FILE}{hint}")


def _may_be_of_the_hub(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash) and all(part and part.replace("-", "_").isidentifier() for part in (owner, rest))


def _names(value: Any) -> Iterator[str]:
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and name not in ("auto", ""):
            yield name


def _may_have_gpu() -> bool:
    """Return False only if there is certainly no GPU: no driver of NVIDIA that finds one, and none of AMD."""
    if Path("/dev/kfd").exists():
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return not Path("/proc").is_dir()  # on another system than Linux the library has another name
    count = ctypes.c_int(0)
    return bool(driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)
