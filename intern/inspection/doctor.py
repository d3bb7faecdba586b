"""A composed training configuration -> everything that can stop its run, looked at in seconds: no weights are loaded.

Each check stands alone: what a library raises inside one becomes a red line, and all others still run. So nothing heavy is imported at
the top of this module, and what checks share (Facts) is made when it is first asked for.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from packaging.specifiers import SpecifierSet

from intern.errors import RunError, UserError
from intern.hardware import available_memory, driver_version, is_hopper, runs_architectures
from intern.inspection.check import AMBER, GREEN, RED, Check
from intern.inspection.context import Facts, NotKnownError
from intern.inspection.installation import answers, existing, requirements, short_path
from intern.memory.estimate import TrainingPeak, datasets_cache, host_memory, run_directory
from intern.paths import find
from intern.units import GIB

_LONG_DATA = 20_000  # rows from which tokenizing takes longer than a person waits for a diagnosis
_TIGHT = 0.9  # share of the free memory above which an estimate may well be wrong
_NO_GPU = "experiment=tiny_cpu runs on a CPU; in Colab choose a T4 runtime"


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
    from intern.upstream import route_messages

    route_messages()
    return Check("imports", GREEN, "every library loads")


_HOPPERS = "nvidia-cudnn-frontend"  # of no use to other cards


def check_accelerators(facts: Facts) -> Check:
    """What makes a GPU faster and may be missing."""
    if facts.on_cpu:
        return Check("accelerators", GREEN, "not needed on a CPU")
    _, wanted = requirements()
    remedy = "pip install '.[gpu]'"
    missing = []
    for requirement in wanted:
        if requirement.name == _HOPPERS and not is_hopper():
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
        missing.append("no triton, which comes with torch for CUDA on Linux")
    if missing:
        return Check("accelerators", AMBER, "; ".join(missing) + ": slower, and more memory", remedy)
    return Check("accelerators", GREEN, "liger-kernel and triton are there")


_OWN = ("format", "run_dir")  # keys of conf/doctor.yaml


def check_configuration(facts: Facts) -> Check:
    """The groups through the same rules and builders that training calls."""
    from intern.config.build import plain
    from intern.model.lora import build_lora
    from intern.training.arguments import build_rules
    from intern.training.rules import check_values

    check_values({name: value for name, value in plain(facts.cfg).items() if name not in _OWN})
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

    driver = driver_version()
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
    if not runs_architectures(major, minor, torch.cuda.get_arch_list()):
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
    if quant is None:
        return Check("quantization", GREEN, "none")
    import torch

    device = "cpu" if facts.on_cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise NotKnownError("GPU")
    error = quant.self_test(device)
    found = f"{quant.name} on {device}, mean error {error:.3f} of a matrix of numbers up to 1"
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
    found = f"{short_path(base.name)}: {base.parameters() / 1e6:,.1f} million parameters, {positions:,} positions"
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
    facts.known("data", "configuration")
    return _rows(facts, "training rows", scoring=False)


def check_golden_rows(facts: Facts) -> Check:
    """data.eval_file, row by row."""
    data = facts.known("data", "configuration")
    if data.eval_share:
        return Check("golden rows", GREEN, f"held out: {data.eval_share:.0%} of the training rows, by document")
    if not data.eval_files:
        return Check("golden rows", AMBER, "none: nothing will say what the adapter is worth", "give data.eval_file")
    return _rows(facts, "golden rows", scoring=True)


def check_gpu_memory(facts: Facts) -> Check:
    """An estimate of the training step against what is free on the card."""
    if facts.on_cpu:
        return Check("GPU memory", GREEN, "not needed: trainer.use_cpu=true")
    base, peak = facts.known("base", "model"), _peak(facts)
    import torch

    from intern.model.sizes import check_fit

    chosen = facts.trainer.get("activation_checkpointing")
    least = peak.kept if chosen is False else peak.recomputed
    found = f"about {least / GIB:.1f} GiB needed" + (
        f" ({peak.kept / GIB:.1f} where no layer recomputes its activations)" if chosen == "auto" else ""
    )
    if not torch.cuda.is_available():
        return Check("GPU memory", AMBER, f"{found}; there is no GPU to compare with", "mend first: GPU")
    check_fit(base, facts.quant, facts.known("precision", "precision"))
    cap = torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction()
    return _fits("GPU memory", found, least, min(torch.cuda.mem_get_info()[0], cap), _smaller(chosen))


def check_host_memory(facts: Facts) -> Check:
    """An estimate of what loading and training take on the host."""
    peak = None
    if facts.on_cpu:
        from intern.model.sizes import check_fit

        check_fit(facts.known("base", "model"), facts.quant, facts.known("precision", "precision"))
        peak = _peak(facts)
    need = host_memory(facts.on_cpu, peak)
    return _fits("host memory", f"about {need / GIB:.1f} GiB needed", need, available_memory(), "close other programs")


def check_disk(facts: Facts) -> Check:
    """Room for the download, the datasets cache and the run, together where they share a file system."""
    import datasets
    from huggingface_hub import constants

    needs: dict[Path, list[tuple[str, float]]] = {}

    def add(path: str | Path, name: str, size: float) -> None:
        needs.setdefault(existing(Path(path)), []).append((name, size))

    with contextlib.suppress(NotKnownError):  # what is not known here has a line of its own
        if size := facts.known("download", "weights"):
            add(constants.HF_HUB_CACHE, "download", size)
    with contextlib.suppress(NotKnownError):
        data = facts.known("data", "configuration")
        size = sum(_size(path) for path in (*data.train_files, *data.eval_files))
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
    if os.access(existing(path), os.W_OK | os.X_OK):
        return Check("run directory", GREEN, f"{path} can be written")
    return Check(
        "run directory",
        RED,
        f"{path}: no permission to write in {existing(path)}",
        "take another folder: hydra.run.dir=...",
    )


def check_tracker(facts: Facts) -> Check:
    """W&B: its mode, a key, and whether it answers."""
    settings = facts.known("logger", "configuration").get("wandb")
    mode = (settings is not None and settings.mode) or os.environ.get("WANDB_MODE")
    if settings is None or mode in ("offline", "disabled"):
        return Check("W&B", GREEN, mode or "off (logger=none)")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        if mode == "online":
            return Check(
                "W&B", RED, "logger.mode=online, and there is no API key", "`wandb login`, or logger.mode=offline"
            )
        return Check("W&B", GREEN, "no API key: the run is logged offline, `wandb sync` uploads it later")
    url = wandb.Settings().base_url
    if answers(url):
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


def _rows(facts: Facts, name: str, scoring: bool) -> Check:
    import datasets

    from intern.data.sources import locate, read_sources
    from intern.data.tokenize import tokenize

    datasets.disable_progress_bars()
    data = facts.data
    names, key = (data.eval_files, "data.eval_file") if scoring else (data.train_files, "data.train_file")
    table = read_sources(locate(names, key), data, training=not scoring)
    rows = table.rows
    found = f"{table.name}: {len(rows):,} rows"
    if len(rows) > _LONG_DATA:
        return Check(name, GREEN, f"{found}, each as it must be; tokens not counted here", "python -m intern.preview")
    try:
        prompt, args = facts.known("prompt", "tokenizer"), facts.known("args", "configuration")
    except NotKnownError as missing:
        return Check(name, AMBER, f"{found}, each as it must be; tokens not counted", f"mend first: {missing}")
    tokens = tokenize(rows, facts.tokenizer, prompt, args.max_length, data.num_proc, table.name, scoring, data.loss_on)
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


def _size(path: str) -> int:
    found = find(path)
    return found.stat().st_size if found is not None and found.is_file() else 0


def _amount(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
