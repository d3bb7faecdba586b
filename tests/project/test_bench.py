"""The benchmark script at its smallest, on the CPU."""

import gc
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
import types
import weakref

import bitsandbytes as bnb
import pytest
import torch
from helpers import ROOT

from intern.kernels.isolated_attention import DISABLE_FLASH_ATTENTION, has_flash_attention

BRIEF = ["--precision", "fp32", "--warmup", "1", "--length", "160"]


def bench(tmp_path, settings, *flags):
    """Run the script; check its table and its plot, and return the metrics of all settings."""
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    line = [sys.executable, "scripts/bench_train.py", "data/tiny_llama3", *BRIEF, *flags]
    line += ["--json", str(figures), "--plot", str(picture), *settings]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(settings) and len({line.count("|") for line in table}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    return {one["setting"]: one for one in json.loads(figures.read_text())}


@pytest.mark.slow
def test_each_setting_is_measured_in_its_own_process(tmp_path):
    figures = bench(tmp_path, ["ours:pack", "nobody"], "--steps", "3", "--rows", "24")
    assert len(figures["ours:pack"]["milliseconds"]) == 2  # from the second step on
    assert figures["ours:pack"]["tokens_per_second"] > 0 and figures["ours:pack"]["tokens_per_step"] <= 160
    assert "error" in figures["nobody"]


@pytest.mark.slow
def test_in_one_process_we_agree_with_the_plain_recipe_and_settings_may_differ_in_length_batch_and_rank(tmp_path):
    settings = ["ours", "trl", "ours:full:length=320:batch=2:rank=4", "nobody"]
    flags = ["--one-process", "--steps", "2", "--rows", "4", "--logging-steps", "1"]
    figures = bench(tmp_path, settings, *flags)
    # The same rows in the same order, adapters that start at zero: the first loss is the plain recipe's.
    assert math.isclose(figures["ours"]["losses"][0], figures["trl"]["losses"][0], rel_tol=1e-3)
    assert figures[settings[2]]["tokens_per_step"] == 640
    assert "error" in figures["nobody"]


def test_in_one_process_no_setting_holds_what_the_optimizer_of_another_registered(monkeypatch):
    """Whichever system trained: each would be measured with less memory than the one before."""
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "scripts" / "bench_train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    noted = []

    def train(*_):
        embeddings = torch.nn.Embedding(3, 4)
        noted.append(weakref.ref(embeddings))
        bnb.optim.GlobalOptimManager.get_instance().register_module_override(embeddings, "weight", {"optim_bits": 32})
        return {}

    monkeypatch.setattr(script, "train", train)
    script.measure_here("unsloth", None)
    gc.collect()
    assert noted[0]() is None


def test_an_imitated_t4_has_its_memory_and_no_flash_attention(monkeypatch):
    fractions, switched_off = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = types.SimpleNamespace(total_memory=147 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for name in ("enable_flash_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda wanted, name=name: switched_off.append((name, wanted)))
    # Set and removed, so that what the script sets is undone; another os.environ would stay in libraries that are imported meanwhile.
    monkeypatch.setenv(DISABLE_FLASH_ATTENTION, "0")
    monkeypatch.delenv(DISABLE_FLASH_ATTENTION)
    half = torch.zeros(1, dtype=torch.float16)
    assert has_flash_attention(half)
    runpy.run_path(str(ROOT / "scripts" / "imitate_t4" / "sitecustomize.py"))
    assert not has_flash_attention(half)
    assert os.environ[DISABLE_FLASH_ATTENTION] == "1"  # processes that it starts have it too
    assert fractions == [pytest.approx(0.1)] and switched_off == [
        ("enable_flash_sdp", False),
        ("enable_cudnn_sdp", False),
    ]
