"""What several tests share: commands, short runs, golden rows, small models."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bitsandbytes as bnb
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model

from intern.paths import CONF_DIR
from intern.runs.directory import Run

ROOT = Path(__file__).resolve().parent.parent


def command(
    *arguments: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` as a user would."""
    line = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert not check or done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done


def _few_golden_rows() -> Path:
    """32 rows of each half: scoring all of them after every short run would take most of the suite's time."""
    folder = Path(tempfile.mkdtemp(prefix="intern-tests-"))
    atexit.register(shutil.rmtree, folder)
    lines = (ROOT / "data" / "golden_test_set.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    halves = [[line for line in lines if json.loads(line)["seen_chunk"] is seen] for seen in (True, False)]
    (folder / "golden_test_set.jsonl").write_text("".join(halves[0][:32] + halves[1][:32]), encoding="utf-8")
    return folder / "golden_test_set.jsonl"


GOLDEN = _few_golden_rows()
SHORT = (
    "experiment=tiny_cpu",
    f"data.eval_file={GOLDEN}",
    "data.context=never",
    "trainer.max_steps=12",
    "trainer.min_steps=12",
    "trainer.save_steps=6",
    "trainer.logging_steps=2",
)


def composed(*overrides, name="train"):
    """The configuration that a command with these overrides has."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def train(path, *overrides):
    """A short run of the tiny base in this process, without a tracker."""
    from intern.training.finetune import finetune

    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    finetune(composed(*SHORT, "logger=none", *overrides), run)
    return run


def run_directory(path, loss=None, failure=None, golden="golden", checkpoints=True, **config):
    """A run directory with a bit of everything that training writes."""
    path.mkdir(parents=True)
    run = Run(path)
    run.write_config(OmegaConf.create({"seed": 1, "lora": {"r": 8}, "data": {"eval_file": f"/{golden}"}, **config}))
    for file in ("history.jsonl", "train.log", "prompt.json", "run.lock", ".hydra/config.yaml", "adapter/weights"):
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text("{}")
    if checkpoints:
        (path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        (path / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(b"0" * 5000)
    if loss is not None:
        run.write_json(run.metrics, {"schema_version": 1, "train_loss": 2.0, "eval_loss": loss})
    if failure is not None:
        run.write_json(run.failure, {"exit_code": 1, "error": failure, "begins_anew": True})
    return run


def wandb_file(run):
    [file] = Path(run).glob("wandb/offline-run-*/*.wandb")
    return file


def inspect(run):
    """What an offline W&B run holds, by W&B's own reader."""
    program = str(Path(sys.executable).with_name("wandb"))
    line = [program, "leet", "inspect", "--summary", "--json", str(wandb_file(run))]
    return json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


class Server(ThreadingHTTPServer):
    """Replies in the order of `replies`, each (status, content); the last one again and again."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests = list(replies), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        status, text = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
        payload = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


class Pair(torch.nn.Module):
    is_loaded_in_4bit = True  # how PEFT knows

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.first = bnb.nn.Linear4bit(128, 192, bias=False, compute_dtype=compute, quant_type="nf4")
        self.second = bnb.nn.Linear4bit(192, 128, bias=False, compute_dtype=compute, quant_type="nf4")
        for layer in (self.first, self.second):
            layer.support_avx512bf16_for_cpu = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def adapted(compute=torch.float32, **lora):
    torch.manual_seed(0)
    model = get_peft_model(Pair(compute).to("cpu"), LoraConfig(target_modules=["first", "second"], r=8, **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would depend on A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def passed(model, x):
    """Output, and gradients of the input and every adapter."""
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def tiny_trainer(path, quantized=True, dropout=0.0, targets=("q_proj", "v_proj"), callbacks=(), **more):
    """Our trainer of the tiny base on six rows of 30 tokens, loss on the last ten; three optimizer steps, nothing saved.

    `callbacks` are functions that make a callback for the trainer; `callback_of` finds it afterwards.
    """
    from datasets import Dataset
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    from intern.model.base import Base
    from intern.model.precision import Precision
    from intern.model.quant import FourBit
    from intern.training.arguments import StepRules
    from intern.training.trainer import InternTrainer

    node = {"pretrained_model_name_or_path": "data/tiny_llama3", "attn_implementation": "isolated"}
    base = Base(OmegaConf.create(node))
    nf4 = FourBit(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    ids = [list(range(100 + row, 130 + row)) for row in range(6)]
    labels = [[-100] * 20 + row[20:] for row in ids]
    args = SFTConfig(
        **{
            "output_dir": str(path),
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "seed": 1,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        | more
    )
    trainer = InternTrainer(
        StepRules(3, 5),
        model=base.load(nf4 if quantized else None, Precision("cpu", torch.float32, False, False)),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=base.tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets), lora_dropout=dropout),
    )
    for build in callbacks:
        trainer.add_callback(build(trainer))
    return trainer


def callback_of(trainer, kind):
    """The trainer's callback of a class."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def adapters(trainer):
    """The trained parameters, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def made(path, eval_loss=1.0, rank=8, rate=0.001, evaluation=None, data="golden", **extra):
    """A finished run as intern.train leaves one, without its weights."""
    path.mkdir(parents=True)
    run = Run(path)
    config = {
        "seed": 1,
        "lora": {"r": rank, "target_modules": ["q_proj", "v_proj"]},
        "trainer": {"learning_rate": rate},
    }
    run.write_config(OmegaConf.merge(OmegaConf.create(config | {"data": {"eval_file": "/g"}}), OmegaConf.create(extra)))
    metrics = {"train_loss": 2.0, "tokens_per_second": 900.0, "trainable_parameters": 1000 * rank}
    metrics |= {"peak_host_rss_gib": 1 + rank / 100, "train_seconds": 60.5}
    run.write_json(run.metrics, metrics | ({"eval_loss": eval_loss} if eval_loss is not None else {}))
    run.write_json(run.environment, {"data": {"/g": data}, "gpu": None})
    for step in (2, 4):
        run.append_history({"step": step, "optimizer_steps": step, "loss": 3.0 / step})
    if evaluation is not None:
        folder = run.evaluation / "golden_test_set"
        folder.mkdir(parents=True)
        after = {"value": evaluation, "low": evaluation - 0.1, "high": evaluation + 0.1}
        group = {"name": "all", "scores": {"token_f1": {"rows": 100, "before": after, "after": after}}}
        (folder / "metrics.json").write_text(json.dumps({"file_sha256": "g", "groups": [group]}))
    return path
