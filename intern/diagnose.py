"""A composed training configuration -> everything that can stop its run, looked at in seconds: no weights are loaded.

Each check stands alone: what a library raises inside one becomes a red line, and all others still run. So nothing heavy is imported at
the top of this module, and what checks share (Facts) is made when it is first asked for.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from intern.checks import AMBER, GREEN, RED, Check
from intern.errors import RunError, UserError
from intern.estimate import GIB, Shape, TrainingPeak, datasets_cache, host_memory, run_directory, training_peak
from intern.paths import PROJECT

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
    from trl import SFTConfig

    from intern.finetune import DataConfig
    from intern.model import Base
    from intern.precision import Precision
    from intern.prompt import Prompt

_LONG_DATA = 20_000  # rows from which tokenizing takes longer than a person waits for a diagnosis
_TIGHT = 0.9  # share of the free memory above which an estimate may well be wrong
_TIMEOUT = 5  # seconds for one question to the network or the driver
_NO_GPU = "experiment=tiny_cpu runs on a CPU; in Colab choose a T4 runtime"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class NotKnownError(Exception):
    """What a check needs is what another check, named here, has found to be wrong."""


def fact(make: Callable[[Any], Any]) -> Any:
    """A property that is made once; what making it raises is raised each time, without a second try."""
    name = make.__name__

    def get(self: "Facts") -> Any:
        if name not in self.made:
            try:
                self.made[name] = make(self), None
            except Exception as error:  # kept, to be raised to every check that asks
                self.made[name] = None, error
        value, fault = self.made[name]
        if fault is not None:
            raise fault
        return value

    return property(get, doc=make.__doc__)


class Facts:
    """What checks share. An attribute raises what its library or builder raises; `known` turns that into a reference to the check of it."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.made: dict[str, tuple[Any, Exception | None]] = {}
        self._went_offline = False

    def known(self, name: str, check: str) -> Any:
        """The attribute `name`; NotKnownError where it cannot be had, for the reason that `check` tells."""
        try:
            return getattr(self, name)
        except Exception as error:  # whatever it is, the check that is named shows it
            raise NotKnownError(check) from error

    def leave_network(self) -> None:
        """Takes back that the libraries were told not to ask the hub."""
        if self._went_offline:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = False

    @fact
    def logger(self) -> dict[str, Any]:
        from intern.tracking import check_logger

        return check_logger(self.cfg.logger)

    @fact
    def trainer(self) -> dict[str, Any]:
        from intern.config import plain

        return plain(self.cfg.trainer)

    @fact
    def on_cpu(self) -> bool:
        return bool(self.trainer.get("use_cpu"))

    @fact
    def quant(self) -> "BitsAndBytesConfig | None":
        from intern.quant import build_quant

        return build_quant(self.cfg.quant)

    @fact
    def data(self) -> "DataConfig":
        from intern.config import build, plain
        from intern.finetune import DataConfig

        return build(DataConfig, plain(self.cfg.data), "data")

    @fact
    def precision(self) -> "Precision":
        from intern.precision import plan_training

        compute_dtype = self.quant.bnb_4bit_compute_dtype if self.quant is not None else None
        return plan_training(self.on_cpu, self.trainer.get("fp16"), self.trainer.get("bf16"), compute_dtype)

    @fact
    def args(self) -> "SFTConfig":
        """The trainer's arguments; those that a CPU would have where no precision can be planned here."""
        import torch

        from intern.precision import Precision
        from intern.run import Run
        from intern.trainer import build_training_args

        try:
            precision = self.precision
        except UserError:
            precision = Precision("cpu", torch.float32, fp16=False, bf16=False)
        run = Run(Path(self.cfg.run_dir))
        return build_training_args(
            self.cfg.trainer, run, precision, self.cfg.seed, evaluates=self.data.eval_file is not None
        )

    @fact
    def is_folder(self) -> bool:
        """Whether the model is a folder here, for which nobody has to be asked."""
        from intern.paths import find

        folder = find(str(self.cfg.model.get("pretrained_model_name_or_path")))
        return folder is not None and folder.is_dir()

    @fact
    def offline_by_wish(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE)

    @fact
    def online(self) -> bool:
        """Whether the hub answers; the libraries are not left to find out by trying again and again."""
        from huggingface_hub import constants

        if self.is_folder or self.offline_by_wish:
            return not self.offline_by_wish
        if not _answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = self._went_offline = True
        return not self._went_offline

    @fact
    def base(self) -> "Base":
        from intern.model import Base

        _ = self.online
        return Base(self.cfg.model)

    @fact
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.base.tokenizer()

    @fact
    def prompt(self) -> "Prompt":
        from intern.prompt import Prompt

        return Prompt.from_tokenizer(self.tokenizer, self.data.system_prompt, self.data.context)

    @fact
    def adapted(self) -> Any:
        """The model with its adapter, without weights."""
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from intern.lora import build_lora

        with torch.device("meta"):
            return get_peft_model(AutoModelForCausalLM.from_config(self.base.config), build_lora(self.cfg.lora))

    @fact
    def download(self) -> int:
        """Bytes of weights that are still to be fetched."""
        return missing_weights(self.base.name, self.cfg.model.get("revision"))

    @fact
    def state_bytes(self) -> int:
        """Bytes of optimizer states for a trainable parameter."""
        return 2 if "8bit" in str(self.trainer.get("optim", "")) else 8

    @fact
    def peak(self) -> TrainingPeak:
        """What a training step takes on its device."""
        import torch
        from peft.tuners.lora import LoraLayer

        text = self.base.config.get_text_config()
        try:
            dtype, on_gpu = self.precision.dtype, self.precision.device == "cuda"
        except UserError:  # another machine's precision: what the configuration asks for
            dtype, on_gpu = getattr(self.quant, "bnb_4bit_compute_dtype", None) or torch.float16, True
        weights = self.base.weight_bytes(self.quant, dtype)
        if weights is None:
            raise UserError("model: its own quantization has a size that is not known here")
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        inputs = sum(int(layer.in_features or 0) for layer in self.adapted.modules() if isinstance(layer, LoraLayer))
        shape = Shape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            key_value=heads * size,
            weights=weights,
            trainable=self.adapted.get_nb_trainable_parameters()[0],
            adapted_inputs=inputs / text.num_hidden_layers,
        )
        tokens = int(self.args.max_length or 0) * self.args.per_device_train_batch_size
        fused = on_gpu and self.trainer.get("use_liger_kernel") is not False and _installed("liger-kernel")
        return training_peak(shape, tokens, 2 if on_gpu else dtype.itemsize, fused, self.state_bytes)


def check_python(facts: Facts) -> Check:
    """The interpreter against requires-python."""
    needs, _ = requirements()
    found = platform.python_version()
    if found in SpecifierSet(needs):
        return Check("Python", GREEN, found)
    return Check("Python", RED, f"{found}, supported is {needs}", f"make an environment with Python {needs}")


def check_libraries(facts: Facts) -> Check:
    """Installed versions against the ranges of the package's own metadata."""
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
    return Check("libraries", GREEN, f"{len(needed)} in their supported ranges")


def check_imports(facts: Facts) -> Check:
    """Whether the libraries load at all: a compiled part may not fit this system."""
    broken = []
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "wandb"):
        try:
            importlib.import_module(name)
        except Exception as error:  # what a broken installation raises at import has no narrower type
            broken.append(f"{name} ({type(error).__name__}: {_line(error)})")
    if broken:
        return Check("imports", RED, "; ".join(broken), "install it anew: pip install --force-reinstall NAME")
    from intern.libraries import route_messages

    route_messages()
    return Check("imports", GREEN, "every library loads")


def check_accelerators(facts: Facts) -> Check:
    """What makes a GPU faster and may be missing."""
    if facts.on_cpu:
        return Check("accelerators", GREEN, "not needed on a CPU")
    _, wanted = requirements()
    remedy = "pip install '.[gpu]'"
    missing = []
    for requirement in wanted:
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
        missing.append("no triton, which comes with torch for CUDA on Linux")
    if missing:
        return Check("accelerators", AMBER, "; ".join(missing) + ": slower, and more memory", remedy)
    return Check("accelerators", GREEN, "liger-kernel and triton are there")


def check_configuration(facts: Facts) -> Check:
    """The groups through the same builders that training calls."""
    from intern.lora import build_lora
    from intern.trainer import build_rules

    _ = facts.logger
    rules = build_rules(facts.cfg.trainer)
    build_lora(facts.cfg.lora)
    _ = facts.quant
    _ = facts.data
    args = facts.args
    batch = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
    return Check("configuration", GREEN, f"batches of {batch}, at least {rules.min_steps} steps, seed {facts.cfg.seed}")


def check_gpu(facts: Facts) -> Check:
    """The card, its driver, and whether this torch has kernels for it."""
    if facts.on_cpu:
        return Check("GPU", GREEN, "not needed: trainer.use_cpu=true")
    import torch

    driver = _driver()
    if torch.version.cuda is None:
        if driver is None:
            return Check("GPU", RED, "no NVIDIA driver here, and trainer.use_cpu=false", _NO_GPU)
        found = f"driver {driver}, but torch {torch.__version__} is built without CUDA"
        return Check("GPU", RED, found, "install torch again from an index of CUDA builds")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found = f"driver {driver or 'not found'}, torch {torch.__version__}: {_line(error)}"
        return Check(
            "GPU", RED, found, _NO_GPU if driver is None else "update the driver, or take a torch built for it"
        )
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    if not _has_kernels(major, minor, torch.cuda.get_arch_list()):
        built = ", ".join(torch.cuda.get_arch_list())
        return Check(
            "GPU",
            RED,
            f"{name}: torch {torch.__version__} has kernels for {built} only",
            "take a torch that is built for this card",
        )
    if torch.cuda.device_count() > 1:
        found = f"{name}; {torch.cuda.device_count()} GPUs, of which a run uses the first"
        return Check("GPU", AMBER, found, "CUDA_VISIBLE_DEVICES chooses another; sweeps can run beside each other")
    return Check("GPU", GREEN, name)


def check_precision(facts: Facts) -> Check:
    """The precision plan of this machine and this configuration."""
    import torch

    if not facts.on_cpu and not torch.cuda.is_available():
        raise NotKnownError("GPU")
    plan = facts.precision
    if plan.fp16 and torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(
            "precision", AMBER, f"{plan}; this card has bfloat16", "trainer=ampere quant=nf4_bf16 needs no loss scaling"
        )
    return Check("precision", GREEN, str(plan))


def check_quantization(facts: Facts) -> Check:
    """A small matrix through bitsandbytes, quantized and back, on the device of the run."""
    quant = facts.known("quant", "configuration")
    if quant is None or not quant.load_in_4bit:
        return Check("quantization", GREEN, "none" if quant is None else "8 bits")
    import bitsandbytes as bnb
    import torch

    device = "cpu" if facts.on_cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise NotKnownError("GPU")
    matrix = torch.linspace(-1, 1, 128 * 128, device=device).reshape(128, 128)
    kind = quant.bnb_4bit_quant_type
    packed, state = bnb.functional.quantize_4bit(
        matrix, quant_type=kind, compress_statistics=quant.bnb_4bit_use_double_quant
    )
    error = (bnb.functional.dequantize_4bit(packed, state) - matrix).abs().mean().item()
    found = f"{kind} on {device}, mean error {error:.3f} of a matrix of numbers up to 1"
    if error > 0.1:
        return Check("quantization", RED, found, "install bitsandbytes anew: its kernels compute wrongly here")
    return Check("quantization", GREEN, found)


def check_hub(facts: Facts) -> Check:
    """Whether the model hub answers, where the model is not a folder here."""
    if facts.is_folder:
        return Check("hub", GREEN, "not needed: the model is a folder here")
    if facts.offline_by_wish:
        return Check("hub", AMBER, "HF_HUB_OFFLINE is set: only what is in the cache", "unset it to download")
    from huggingface_hub import constants

    if facts.online:
        return Check("hub", GREEN, f"{constants.ENDPOINT} answers")
    return Check("hub", AMBER, f"{constants.ENDPOINT} does not answer: only what is in the cache", "mend the network")


def check_model(facts: Facts) -> Check:
    """The base model's configuration: there, readable, with room for the rows."""
    base = facts.base
    length = facts.known("args", "configuration").max_length
    positions = base.config.get_text_config().max_position_embeddings
    found = f"{_named(base.name)}: {base.parameters() / 1e6:,.1f} million parameters, {positions:,} positions"
    if length > positions:
        return Check("model", RED, f"{found}; trainer.max_length={length:,}", f"trainer.max_length={positions} at most")
    return Check("model", GREEN, found)


def check_weights(facts: Facts) -> Check:
    """The weights: in the folder, in the cache, or to be had."""
    facts.known("base", "model")
    size = facts.download
    return Check("weights", GREEN, f"{size / GIB:.1f} GiB to download" if size else "there")


def check_tokenizer(facts: Facts) -> Check:
    """The tokenizer and what the prompt contract asks of its chat template."""
    facts.known("base", "model")
    tokenizer, prompt = facts.tokenizer, facts.prompt
    found = f"{len(tokenizer):,} tokens; an answer ends with {prompt.template[3]}"
    if tokenizer.pad_token == tokenizer.eos_token:
        return Check("tokenizer", AMBER, f"{found}; pads with it too", "harmless here: masks are explicit")
    return Check("tokenizer", GREEN, found)


def check_adapter(facts: Facts) -> Check:
    """The adapter on the model, by PEFT itself, without weights."""
    base = facts.known("base", "model")
    facts.known("args", "configuration")
    trainable, every = facts.adapted.get_nb_trainable_parameters()
    share = trainable / max(every - trainable, 1)
    modules = sorted({name.rsplit(".", 1)[-1] for name in facts.adapted.targeted_module_names})
    found = f"{trainable / 1e6:,.1f} million trainable parameters ({share:.1%} of the base's) on {', '.join(modules)}"
    if share > 0.25 and base.parameters() > 100_000_000:
        return Check("adapter", AMBER, found, "a rank this high learns like full fine-tuning: lower lora.r")
    return Check("adapter", GREEN, found)


def check_training_rows(facts: Facts) -> Check:
    """data.train_file, row by row."""
    return _rows(facts, "training rows", facts.known("data", "configuration").train_file, "data.train_file", False)


def check_golden_rows(facts: Facts) -> Check:
    """data.eval_file, row by row."""
    data = facts.known("data", "configuration")
    if data.eval_file is None:
        return Check("golden rows", AMBER, "none: nothing will say what the adapter is worth", "give data.eval_file")
    return _rows(facts, "golden rows", data.eval_file, "data.eval_file", True)


def check_gpu_memory(facts: Facts) -> Check:
    """An estimate of the training step against what is free on the card."""
    if facts.on_cpu:
        return Check("GPU memory", GREEN, "not needed: trainer.use_cpu=true")
    base, peak = facts.known("base", "model"), _peak(facts)
    import torch

    chosen = facts.trainer.get("activation_checkpointing")
    least = peak.kept if chosen is False else peak.recomputed
    found = f"about {least / GIB:.1f} GiB needed" + (
        f" ({peak.kept / GIB:.1f} where no layer recomputes its activations)" if chosen == "auto" else ""
    )
    if not torch.cuda.is_available():
        return Check("GPU memory", AMBER, f"{found}; there is no GPU to compare with", "mend first: GPU")
    base.check_fit(facts.quant, facts.known("precision", "precision"))
    cap = torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction()
    return _fits("GPU memory", found, least, min(torch.cuda.mem_get_info()[0], cap), _smaller(chosen))


def check_host_memory(facts: Facts) -> Check:
    """An estimate of what loading and training take on the host."""
    peak = None
    if facts.on_cpu:
        facts.known("base", "model").check_fit(facts.quant, facts.known("precision", "precision"))
        peak = _peak(facts)
    need = host_memory(facts.on_cpu, peak)
    return _fits("host memory", f"about {need / GIB:.1f} GiB needed", need, available_memory(), "close other programs")


def check_disk(facts: Facts) -> Check:
    """Room for the download, the datasets cache and the run, together where they share a file system."""
    import datasets
    from huggingface_hub import constants

    needs: dict[Path, list[tuple[str, float]]] = {}

    def add(path: str | Path, name: str, size: float) -> None:
        needs.setdefault(_existing(Path(path)), []).append((name, size))

    with contextlib.suppress(NotKnownError):  # what is not known here has a line of its own
        if size := facts.known("download", "weights"):
            add(constants.HF_HUB_CACHE, "download", size)
    with contextlib.suppress(NotKnownError):
        data = facts.known("data", "configuration")
        size = sum(_size(path) for path in (data.train_file, data.eval_file) if path)
        add(datasets.config.HF_DATASETS_CACHE, "datasets cache", datasets_cache(size))
    with contextlib.suppress(NotKnownError):
        trainable = facts.known("adapted", "adapter").get_nb_trainable_parameters()[0]
        size = run_directory(trainable, facts.state_bytes, facts.known("args", "configuration").save_total_limit)
        add(facts.cfg.run_dir, "run directory", size)
    systems: dict[int, list[tuple[Path, str, float]]] = {}
    for path, parts in needs.items():
        systems.setdefault(path.stat().st_dev, []).extend((path, *part) for part in parts)
    if not systems:
        raise NotKnownError("configuration, model")
    lines, full = [], False
    for entries in systems.values():
        need, free = sum(size for _, _, size in entries), shutil.disk_usage(entries[0][0]).free
        full |= need > free
        listed = ", ".join(f"{_amount(size)} {name}" for _, name, size in entries)
        lines.append(f"about {listed}; {_amount(free)} free")
    remedy = "free some, or move them: HF_HOME for the caches, hydra.run.dir for the run" if full else ""
    return Check("disk", RED if full else GREEN, "; ".join(lines), remedy)


def check_run_directory(facts: Facts) -> Check:
    """Whether a run can be written."""
    path = Path(facts.cfg.run_dir)
    if os.access(_existing(path), os.W_OK | os.X_OK):
        return Check("run directory", GREEN, f"{path} can be written")
    return Check(
        "run directory",
        RED,
        f"{path}: no permission to write in {_existing(path)}",
        "take another folder: hydra.run.dir=...",
    )


def check_tracker(facts: Facts) -> Check:
    """W&B: its mode, a key, and whether it answers."""
    values = facts.known("logger", "configuration")
    mode = values.get("mode") or os.environ.get("WANDB_MODE")
    if not values or mode in ("offline", "disabled"):
        return Check("W&B", GREEN, mode or "off (logger=none)")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        if mode == "online":
            return Check(
                "W&B", RED, "logger.mode=online, and there is no API key", "`wandb login`, or logger.mode=offline"
            )
        return Check("W&B", GREEN, "no API key: the run is logged offline, `wandb sync` uploads it later")
    url = wandb.Settings().base_url
    if _answers(url):
        return Check("W&B", GREEN, f"an API key, and {url} answers")
    status = RED if mode == "online" else AMBER
    return Check("W&B", status, f"an API key, but {url} does not answer", "logger.mode=offline, or mend the network")


CHECKS: dict[str, Callable[[Facts], Check]] = {
    "Python": check_python,
    "libraries": check_libraries,
    "imports": check_imports,
    "accelerators": check_accelerators,
    "configuration": check_configuration,
    "GPU": check_gpu,
    "precision": check_precision,
    "quantization": check_quantization,
    "hub": check_hub,
    "model": check_model,
    "weights": check_weights,
    "tokenizer": check_tokenizer,
    "adapter": check_adapter,
    "training rows": check_training_rows,
    "golden rows": check_golden_rows,
    "GPU memory": check_gpu_memory,
    "host memory": check_host_memory,
    "disk": check_disk,
    "run directory": check_run_directory,
    "W&B": check_tracker,
}


def diagnose(cfg: DictConfig) -> list[Check]:
    """Every check of conf/doctor.yaml's composition, in the order of CHECKS. Raises nothing."""
    facts = Facts(cfg)
    try:
        return [run_check(name, check, facts) for name, check in CHECKS.items()]
    finally:
        facts.leave_network()


def run_check(name: str, check: Callable[[Facts], Check], facts: Facts) -> Check:
    """One check; what it raises becomes its line."""
    try:
        return check(facts)
    except NotKnownError as missing:
        return Check(name, AMBER, "not looked at", f"mend first: {missing}")
    except (UserError, RunError) as error:
        found, _, remedy = str(error).rpartition(": ")  # these messages end with what to do
        return Check(name, RED, found or str(error), remedy if found else "")
    except Exception as error:  # a check that fails must not hide the others
        return Check(
            name,
            RED,
            f"{type(error).__name__}: {_line(error)}",
            "this check itself failed; training may fail the same way",
        )


def requirements() -> tuple[str, list[Requirement]]:
    """What the project supports: its requires-python, and its requirements with those of extras marked.

    A checkout's pyproject.toml speaks for the code beside it, which an installed copy's metadata may not; a wheel has the metadata alone.
    """
    project = PROJECT / "pyproject.toml"
    if not project.is_file():
        metadata = importlib.metadata.metadata("intern")
        lines = importlib.metadata.requires("intern") or []
        return str(metadata["Requires-Python"]), [Requirement(line) for line in lines]
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = [
        f"{line}; extra == '{extra}'"
        for extra, lines in table.get("optional-dependencies", {}).items()
        for line in lines
    ]
    return table["requires-python"], [Requirement(line) for line in [*table["dependencies"], *extras]]


def missing_weights(name: str, revision: str | None) -> int:
    """Bytes of safetensors files that a model lacks here and the hub has; 0 where all are here.

    Raises:
        UserError: they are neither here nor to be had.
    """
    key = f"model.pretrained_model_name_or_path={_named(name)}"
    folder = Path(name)
    if folder.is_dir():
        if missing := list(_missing(lambda file: str(folder / file) if (folder / file).is_file() else None)):
            raise UserError(
                f"{key}: {', '.join(missing[:3])} missing or cut short in this folder: copy or download the model again"
            )
        return 0
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return path if isinstance(path, str) else None

    if not list(_missing(cached)):
        return 0
    absent = "its weights are not in the cache, and the hub cannot be reached: check the network, or give a folder"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {absent}")
    api = HfApi()
    try:
        api.auth_check(name)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise UserError(f"{key}: gated: accept its licence on its page, then `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{key}: {absent}") from error
    files = [file for file in info.siblings or [] if _WEIGHTS.fullmatch(file.rfilename)]
    if not files:
        raise UserError(f"{key}: has no safetensors weights: take another copy of the model")
    return sum(file.size or 0 for file in files if cached(file.rfilename) is None)


def _missing(find: Callable[[str], str | None]) -> Iterator[str]:
    """The names of weight files that `find` does not find, or that are not whole."""
    if (single := find("model.safetensors")) is not None:
        yield from [] if _whole(single) else ["model.safetensors"]
        return
    index = find("model.safetensors.index.json")
    if index is None:
        yield "model.safetensors"
        return
    for file in sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())):
        path = find(file)
        if path is None or not _whole(path):
            yield file


def _whole(path: str) -> bool:
    """Whether a safetensors file has the length that its header tells of; the weights themselves are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


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


def _rows(facts: Facts, name: str, path: str, key: str, scoring: bool) -> Check:
    import datasets

    from intern.data import DataFile, read_rows, tokenize

    datasets.disable_progress_bars()
    data = facts.data
    file = DataFile.find(path, key)
    rows = read_rows(file, needs_material=data.context != "never")
    found = f"{file.path.name}: {len(rows):,} rows"
    if len(rows) > _LONG_DATA:
        return Check(name, GREEN, f"{found}, each as it must be; tokens not counted here", "python -m intern.preview")
    try:
        prompt, args = facts.known("prompt", "tokenizer"), facts.known("args", "configuration")
    except NotKnownError as missing:
        return Check(name, AMBER, f"{found}, each as it must be; tokens not counted", f"mend first: {missing}")
    tokens = tokenize(rows, facts.tokenizer, prompt, args.max_length, data.num_proc, file.path.name, scoring)
    if tokens.dropped or tokens.shortened:
        found += f", {len(tokens.dropped):,} dropped, {tokens.shortened:,} shortened to {args.max_length:,} tokens"
        return Check(name, AMBER, found, "raise trainer.max_length; python -m intern.preview shows them")
    return Check(name, GREEN, f"{found}, all fit into {args.max_length:,} tokens")


def _peak(facts: Facts) -> TrainingPeak:
    facts.known("adapted", "adapter")
    facts.known("args", "configuration")
    return facts.peak


def _fits(name: str, found: str, need: float, free: float, remedy: str) -> Check:
    found += f", {free / GIB:.1f} free"
    if need > free:
        return Check(name, RED, found, remedy)
    return Check(name, AMBER, f"{found}: tight", remedy) if need > _TIGHT * free else Check(name, GREEN, found)


def _smaller(checkpointing: Any) -> str:
    least = "trainer.activation_checkpointing=auto, or " if checkpointing is False else ""
    return f"{least}lower trainer.per_device_train_batch_size, then trainer.max_length"


def _has_kernels(major: int, minor: int, built: list[str]) -> bool:
    """Whether code for these architectures runs: binaries within a major version from their minor on, PTX from its version on."""
    for name in built:
        kind, _, digits = name.partition("_")
        number = int(re.sub(r"\D", "", digits))
        if kind == "compute" and number <= 10 * major + minor:
            return True
        if kind == "sm" and number // 10 == major and number % 10 <= minor:
            return True
    return False


def _driver() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=2 * _TIMEOUT).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _answers(url: str) -> bool:
    """Whether anything answers at an address, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def _size(path: str) -> int:
    from intern.paths import find

    found = find(path)
    return found.stat().st_size if found is not None and found.is_file() else 0


def _named(path: str) -> str:
    """A path inside the project or the working directory without what lies above."""
    for root in (Path.cwd(), PROJECT):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return path


def _amount(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
