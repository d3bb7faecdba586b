"""python scripts/bench_train.py CHECKPOINT --precision fp16 --cap 14.7

Measures training speed and memory of this project next to the plain TRL recipe and, if it can be imported, Unsloth: the same checkpoint,
rows, LoRA shape and memory cap, each system in its own process. Prints one table; --json stores every metric and the losses of all steps.
One file of more than 300 lines, so that it can be copied into an environment that has Unsloth but not this project.

A setting is SYSTEM and flags, such as ours:pack:auto:liger, trl:batch=8:ckpt or unsloth:pack. Systems: ours, trl, unsloth. Flags:
batch=N, pack, ckpt (every layer checkpointed; ours and Unsloth's keep the layers' inputs in host memory), auto (ours: as many layers as
the memory requires, measured), eager (ours: no CUDA graphs), liger (ours: Triton layers), cache=FOLDER (ours: the quantized base is
stored there, and read from there the second time), optim=NAME (transformers' name, paged_adamw_8bit by default), length=N, rank=N and
full (every row has that length), if a setting differs from --length, --rank and --full-rows.

With --one-process, the first step of a setting does not include imports, and the plot shows what a step costs:

    python scripts/bench_train.py CHECKPOINT --one-process --steps 6 --warmup 2 --plot cost.png \\
        ours:auto:liger:full:length=512 ours:auto:liger:full:length=2048 ours:auto:liger:full:batch=8:rank=64
"""

import argparse
import gc
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project, if it is not installed
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
_LONG_RUN = 1000  # optimizer steps
SETTINGS = ["ours:pack:auto:liger", "ours:pack:ckpt:liger", "trl:ckpt", "unsloth:pack:ckpt", "unsloth:ckpt"]


def random_rows(
    count: int, length: int, vocabulary: int, full: bool = False, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Rows of random tokens: lognormal lengths (median 420 tokens, sigma 0.7) from 96 to `length`, loss on the last 10 to 40 %."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = length if full else int(min(max(draw.lognormvariate(math.log(420), 0.7), 96), length))
        ids = [draw.randrange(10, vocabulary) for _ in range(size)]
        silent = int(size * draw.uniform(0.6, 0.9))
        rows.append({"input_ids": ids, "labels": [-100] * silent + ids[silent:]})
    return rows


def train(setting: str, args: argparse.Namespace, started: float) -> dict[str, Any]:
    """Measure one setting.

    Args:
        setting: SYSTEM and flags.
        args: of the command line.
        started: time (seconds since the epoch) from which its first step counts.
    """
    system, *flags = setting.split(":")
    packing, checkpointing = "pack" in flags, "ckpt" in flags
    named = dict(flag.split("=", 1) for flag in flags if "=" in flag)
    args = argparse.Namespace(**vars(args))
    args.length, args.rank = int(named.get("length", args.length)), int(named.get("rank", args.rank))
    args.full_rows |= "full" in flags
    if system == "unsloth":
        import unsloth  # noqa: F401 - has to be imported before the libraries that it patches
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # of the setting before, in the same process
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    if args.t4:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        os.environ["INTERN_DISABLE_FLASH_ATTENTION"] = (
            "1"  # the switches above do not reach ours (isolated_attention.py)
        )

    class Clock(TrainerCallback):
        """Notes when the first step, the last warm-up step and the last step ended; between them the clock does not wait for the GPU."""

        def __init__(self) -> None:
            self.ends: dict[int, float] = {}
            self.losses: list[float] = []
            self.marks: list[Any] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu:  # an event in the GPU's stream, read after the last step
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.time())
            if state.global_step in (1, warm, args.max_steps):
                if on_gpu:
                    torch.cuda.synchronize()
                self.ends[state.global_step] = time.time()

        def milliseconds(self) -> list[int]:
            """Return the duration of each step, from the second one on."""
            pairs = itertools.pairwise(self.marks)
            return [round(a.elapsed_time(b) if on_gpu else 1000 * (b - a)) for a, b in pairs]

        def on_log(self, *_: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                self.losses.append(float(given["logs"]["loss"]))

    warm = max(1, min(args.warmup, args.steps - 1))
    vocabulary = AutoConfig.from_pretrained(args.checkpoint).vocab_size
    rows = Dataset.from_list(random_rows(args.rows, args.length, vocabulary, args.full_rows))
    common = {
        "output_dir": "/tmp/bench_train",  # nothing is saved
        "max_steps": args.steps,
        "per_device_train_batch_size": int(named.get("batch", 1)),
        "gradient_accumulation_steps": args.accumulation,
        "max_length": args.length,
        "packing": packing,
        "learning_rate": 2e-4,
        "optim": named.get("optim", "paged_adamw_8bit" if on_gpu else "adamw_torch"),
        "fp16": args.precision == "fp16",
        "bf16": args.precision == "bf16",
        "use_cpu": not on_gpu,
        "logging_steps": args.logging_steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    build = {"ours": _ours, "trl": _trl, "unsloth": _unsloth}[system]
    common["use_liger_kernel"] = "liger" in flags
    args.cache = named.get("cache")
    trainer = build(args, common, dtype, rows, tokenizer, checkpointing or "auto" in flags)
    memory = None
    if system == "ours" and on_gpu and (checkpointing or "auto" in flags):
        from intern.memory.callback import FitMemory
        from intern.runs.directory import Run

        (folder := Path(common["output_dir"])).mkdir(exist_ok=True)
        trainer.add_callback(memory := FitMemory(trainer, Run(folder), checkpointing, "eager" not in flags))
    clock = Clock()
    trainer.add_callback(clock)
    seen = []
    compute_loss = trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        seen.append(int(mask.sum()) if mask is not None and mask.ndim == 2 else inputs["input_ids"].numel())
        return compute_loss(model, inputs, *rest, **kwargs)

    trainer.compute_loss = counted
    if memory is not None:  # the probes before the first step are not steps
        begin = memory.on_train_begin

        def forgetful(given: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            steps, state.max_steps = state.max_steps, _LONG_RUN  # what pays in a long run, not in these few steps
            begin(given, state, *rest, **kwargs)
            state.max_steps = steps
            seen.clear()

        memory.on_train_begin = forgetful  # type: ignore[method-assign,assignment]
    trainer.train()
    # The memory of CUDA graphs counts only as reserved, so with them the peak is all that the process holds.
    replayed = memory is not None and memory.plan is not None and memory.plan.replayed
    peak = torch.cuda.max_memory_reserved() if replayed else torch.cuda.max_memory_allocated()
    seconds = clock.ends[args.steps] - clock.ends[warm]
    tokens = seen[warm * args.accumulation : args.steps * args.accumulation]
    return {
        "setting": setting,
        "tokens_per_second": round(sum(tokens) / seconds),
        "step_seconds": round(seconds / (args.steps - warm), 3),
        "tokens_per_step": round(sum(tokens) / (args.steps - warm)),
        "first_step_seconds": round(clock.ends[1] - started, 1),
        "peak_gib": round(peak / 2**30, 2) if on_gpu else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else None,
        "checkpointed_layers": memory.plan.checkpointed if memory is not None and memory.plan else None,
        "plan": str(memory.plan) if memory is not None else None,
        "milliseconds": clock.milliseconds(),
        "losses": clock.losses,
    }


def _ours(args: Any, common: dict[str, Any], dtype: Any, rows: Any, tokenizer: Any, checkpointing: bool) -> Any:
    from omegaconf import OmegaConf
    from peft import LoraConfig
    from trl import SFTConfig

    from intern.model.attention import choose_attention
    from intern.model.base import Base
    from intern.model.precision import Precision
    from intern.model.quant import build_quant
    from intern.training.arguments import StepRules
    from intern.training.model_rules import batches_need_no_padding
    from intern.training.trainer import InternTrainer

    node = {"pretrained_model_name_or_path": str(args.checkpoint), "attn_implementation": "isolated"}
    base = Base(OmegaConf.create(node | {"quantized_cache": args.cache, "quantized_cache_gib": 24}))
    quant = build_quant(OmegaConf.create(_quantization(dtype)))
    device = "cpu" if common["use_cpu"] else "cuda"
    model = base.load(quant, Precision(device, dtype, common["fp16"], common["bf16"]))
    common["padding_free"] = batches_need_no_padding(
        {"model": node, "trainer": common}, lambda: choose_attention(base.config, "isolated", common["max_length"])
    )
    config = SFTConfig(
        **common,
        activation_checkpointing=checkpointing,
        logging_nan_inf_filter=False,  # as in intern/training/arguments.py
        include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": not common["packing"]},
    )
    lora = LoraConfig(**_lora(args))
    return InternTrainer(
        StepRules(0, 1000), model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )


def _trl(args: Any, common: dict[str, Any], dtype: Any, rows: Any, tokenizer: Any, checkpointing: bool) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        quantization_config=BitsAndBytesConfig(**_quantization(dtype)),
        dtype=dtype,
        device_map={"": "cpu" if common["use_cpu"] else 0},
        attn_implementation="sdpa",
    )
    config = SFTConfig(**common, gradient_checkpointing=checkpointing)
    lora = LoraConfig(**_lora(args))
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    if common["fp16"]:  # the one change without which the plain recipe fails at its first step
        adapted: Any = trainer.model
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    return trainer


def _unsloth(args: Any, common: dict[str, Any], dtype: Any, rows: Any, tokenizer: Any, checkpointing: bool) -> Any:
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(args.checkpoint), max_seq_length=args.length, dtype=dtype, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **{key: value for key, value in _lora(args).items() if key != "task_type"},
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    return SFTTrainer(model, args=SFTConfig(**common), train_dataset=rows, processing_class=tokenizer)


def _lora(args: Any) -> dict[str, Any]:
    targets = ATTENTION + MLP if args.all_linear else ATTENTION
    return {"task_type": "CAUSAL_LM", "r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": targets}


def _quantization(dtype: Any) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": name,
    }


def measure(setting: str, arguments: list[str], site: str | None) -> dict[str, Any]:
    """Run one setting in a new process; one that fails returns its last error line."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_MODE": "disabled"}
    if setting.startswith("unsloth") and site:
        environment["PYTHONPATH"] = site
    line = [sys.executable, __file__, *arguments, "--only", setting]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    for text in reversed(done.stdout.splitlines()):
        if text.startswith('{"setting"'):
            return json.loads(text)
    errors = [text for text in (done.stderr + done.stdout).splitlines() if "Error" in text] or ["no error line"]
    return {"setting": setting, "error": errors[-1][:120]}


def measure_here(setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one setting in this process: without the time for imports, and with the caches of earlier settings warm."""
    try:
        return train(setting, args, time.time())
    except Exception as error:  # the other settings are still worth measuring
        return {"setting": setting, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]}
    finally:
        import torch

        from intern.upstream import forget_optimizers

        forget_optimizers()  # also a peer's: the next setting would have 1 GiB less
        gc.collect()
        torch.cuda.empty_cache()


def plot(results: list[dict[str, Any]], target: Path, cost: bool) -> None:
    """Plot tokens/s against peak GPU memory or, for `cost`, seconds against tokens per step; failed settings are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    (_plot_cost if cost else _plot_memory)(axes, [one for one in results if "error" not in one])
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def _plot_memory(axes: Any, points: list[dict[str, Any]]) -> None:
    colors = {"ours": "#1f77b4", "unsloth": "#d62728", "trl": "#7f7f7f"}
    most = max(one["peak_gib"] or 1 for one in points)
    for one in points:
        x, y = one["peak_gib"] or 0, one["tokens_per_second"]
        axes.plot(x, y, "o", color=colors[one["setting"].split(":")[0]], markersize=8)
        shift, side = ((-7, 4), "right") if x > most / 2 else ((7, 4), "left")  # the name must be inside the picture
        axes.annotate(one["setting"], (x, y), xytext=shift, textcoords="offset points", fontsize=8, ha=side)
    axes.set_xlabel("peak GPU memory (GiB)")
    axes.set_ylabel("tokens/s")
    axes.set_xlim(0, 1.1 * most)
    axes.set_ylim(0, 1.1 * max(one["tokens_per_second"] for one in points))


def _plot_cost(axes: Any, points: list[dict[str, Any]]) -> None:
    """Both axes are logarithmic: points along the grey lines have a cost that is proportional to their tokens."""
    from matplotlib.ticker import FuncFormatter

    series: dict[str, list[tuple[int, float]]] = {}  # settings that differ only in the length of their rows
    for one in points:
        flags = [flag for flag in one["setting"].split(":") if not flag.startswith("length=")]
        series.setdefault(":".join(flags), []).append((one["tokens_per_step"], one["step_seconds"]))
    for name, pairs in series.items():
        axes.loglog(*zip(*sorted(pairs), strict=True), "o-", markersize=6, linewidth=1, label=name)
    every = [pair for pairs in series.values() for pair in pairs]
    least, most = min(x for x, _ in every), max(x for x, _ in every)
    for each in (min(y / x for x, y in every), max(y / x for x, y in every)):
        axes.loglog([least, most], [each * least, each * most], color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_xticks(sorted({x for x, _ in every}))
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("seconds per step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="bf16")
    parser.add_argument("--cap", type=float, default=0, help="GiB of GPU memory that a process may take (a T4: 14.7)")
    parser.add_argument("--t4", action="store_true", help="no flash or cuDNN attention, which a T4 does not have")
    parser.add_argument("--length", type=int, default=2048, help="maximum tokens of a row, and of a pack")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--full-rows", action="store_true", help="every row has --length tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--all-linear", action="store_true", help="adapters on the MLP's layers too")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="steps at the beginning that do not count")
    parser.add_argument("--logging-steps", type=int, default=5)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument(
        "--unsloth-site", help="PYTHONPATH of Unsloth's process, if it needs other versions of the libraries"
    )
    parser.add_argument("--json", type=Path, help="file for all metrics")
    parser.add_argument(
        "--plot",
        type=Path,
        help="PNG: tokens/s against peak memory, one point per setting; with --one-process: seconds against tokens per step",
    )
    parser.add_argument("--one-process", action="store_true", help="all settings in this process, one after the other")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.only:
        print(json.dumps(train(args.only, args, psutil.Process().create_time())))
        return
    given = [text for text in sys.argv[1:] if text not in args.settings]
    results = []
    for setting in args.settings:
        here = args.one_process
        results.append(measure_here(setting, args) if here else measure(setting, given, args.unsloth_site))
        print(f"{setting}: {results[-1].get('error') or results[-1]['tokens_per_second']}", file=sys.stderr, flush=True)
        if args.json:  # after each setting: its metrics are stored even if the next one kills the process
            args.json.write_text(json.dumps(results, indent=1))
    if args.plot:
        plot(results, args.plot, cost=args.one_process)
    print(
        "| setting | tokens/s | tokens per step | seconds per step | peak GiB | reserved GiB | first step after s | layers checkpointed | mean loss |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for one in results:
        if "error" in one:
            print(f"| {one['setting']} | {one['error']} | | | | | | | |")
        else:
            names = (
                "tokens_per_second",
                "tokens_per_step",
                "step_seconds",
                "peak_gib",
                "reserved_gib",
                "first_step_seconds",
                "checkpointed_layers",
            )
            figures = ["" if one[name] is None else one[name] for name in names]
            loss = f"{statistics.mean(one['losses']):.3f}" if one["losses"] else ""  # fewer steps than --logging-steps
            print(f"| {one['setting']} | {' | '.join(map(str, figures))} | {loss} |")


if __name__ == "__main__":
    main()
