"""The doctor's checks of the machine: Python, libraries, GPU, precision, quantization."""

import importlib
import importlib.metadata
import importlib.util
import platform

from packaging.specifiers import SpecifierSet

from intern.errors import one_line
from intern.hardware import driver_version, is_hopper, runs_architectures
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.doctor_pieces import DoctorPieces, SkippedError
from intern.inspection.installation import requirements

_HOPPER_ONLY = "nvidia-cudnn-frontend"  # useless on other GPUs
_NO_GPU = "experiment=tiny_cpu runs on a CPU; in Colab choose a T4 runtime"


def check_python(pieces: DoctorPieces) -> Check:
    """Compare the interpreter with requires-python."""
    needs, _ = requirements()
    found = platform.python_version()
    if found in SpecifierSet(needs):
        return Check("Python", GREEN, found)
    return Check("Python", RED, f"{found}, but {needs} is required", f"create an environment with Python {needs}")


def check_libraries(pieces: DoctorPieces) -> Check:
    """Compare installed versions with the ranges that the package itself requires."""
    _, wanted = requirements()
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong, remedy = [], []
    for requirement in needed:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (supported: {requirement.specifier})")
            remedy.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        return Check("libraries", RED, "; ".join(wrong), f"pip install {' '.join(remedy)}")
    return Check("libraries", GREEN, f"{len(needed)} packages in their supported ranges")


def check_imports(pieces: DoctorPieces) -> Check:
    """Import the libraries: a compiled part may not work on this system."""
    broken = []
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "wandb"):
        try:
            importlib.import_module(name)
        except Exception as error:  # what a broken installation raises at import has no narrower type
            broken.append(f"{name} ({one_line(error)[:300]})")
    if broken:
        return Check("imports", RED, "; ".join(broken), "reinstall it: pip install --force-reinstall NAME")
    from intern.upstream import route_messages

    route_messages()
    return Check("imports", GREEN, "all libraries load")


def check_accelerators(pieces: DoctorPieces) -> Check:
    """Find out what makes a GPU faster and may be missing."""
    if pieces.on_cpu:
        return Check("accelerators", GREEN, "not needed on a CPU")
    _, wanted = requirements()
    remedy = "pip install '.[gpu]'"
    missing = []
    for requirement in wanted:
        if requirement.name == _HOPPER_ONLY and not is_hopper():
            continue
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "gpu"}):
            try:
                found = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(f"no {requirement.name}")
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                missing.append(f"{requirement.name} {found} (supported: {requirement.specifier})")
                remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    if importlib.util.find_spec("triton") is None:
        missing.append("no triton, which is part of torch for CUDA on Linux")
    if missing:
        return Check("accelerators", AMBER, "; ".join(missing) + ": training is slower and needs more memory", remedy)
    return Check("accelerators", GREEN, "liger-kernel and triton are installed")


def check_gpu(pieces: DoctorPieces) -> Check:
    """Check the GPU, its driver, and whether this torch has kernels for it."""
    if pieces.on_cpu:
        return Check("GPU", GREEN, "not needed: trainer.use_cpu=true")
    import torch

    driver = driver_version()
    if torch.version.cuda is None:
        if driver is None:
            return Check("GPU", RED, "no NVIDIA driver found, and trainer.use_cpu=false", _NO_GPU)
        found = f"driver {driver}, but torch {torch.__version__} is built without CUDA"
        return Check("GPU", RED, found, "reinstall torch from an index of CUDA builds")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found = f"driver {driver or 'not found'}, torch {torch.__version__}: {one_line(error)[:300]}"
        return Check(
            "GPU",
            RED,
            found,
            _NO_GPU if driver is None else "update the driver, or install a torch that is built for it",
        )
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    if not runs_architectures(major, minor, torch.cuda.get_arch_list()):
        built = ", ".join(torch.cuda.get_arch_list())
        return Check(
            "GPU",
            RED,
            f"{name}: torch {torch.__version__} has kernels for {built} only",
            "install a torch that is built for this GPU",
        )
    if torch.cuda.device_count() > 1:
        found = f"{name}; {torch.cuda.device_count()} GPUs, and a run uses the first"
        return Check(
            "GPU",
            AMBER,
            found,
            "CUDA_VISIBLE_DEVICES selects another; hydra/launcher=gpus runs the jobs of a sweep on all of them",
        )
    return Check("GPU", GREEN, name)


def check_precision(pieces: DoctorPieces) -> Check:
    """Show what this configuration computes in on this machine."""
    import torch

    _ = pieces.precision_rules
    if not pieces.on_cpu and not torch.cuda.is_available():
        raise SkippedError("GPU")
    plan = pieces.precision
    if plan.fp16 and torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(
            "precision", AMBER, f"{plan}; this GPU has bfloat16", "trainer=ampere quant=nf4_bf16 needs no loss scaling"
        )
    return Check("precision", GREEN, str(plan))


def check_quantization(pieces: DoctorPieces) -> Check:
    """Quantize and dequantize a small matrix with bitsandbytes, on the run's device."""
    quant = pieces.known("quant", "configuration")
    if quant is None:
        return Check("quantization", GREEN, "none")
    import torch

    device = "cpu" if pieces.on_cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SkippedError("GPU")
    error = quant.self_test(device)
    found = f"{quant.name} on {device}, mean error {error:.3f} on a matrix with values from -1 to 1"
    if error > 0.1:
        return Check("quantization", RED, found, "reinstall bitsandbytes: its kernels compute wrong results here")
    return Check("quantization", GREEN, found)
