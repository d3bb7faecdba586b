"""The benchmark script at its smallest, on the CPU."""

import json
import math
import subprocess
import sys

from conftest import ROOT


def test_the_benchmark_measures_us_beside_the_plain_recipe(tmp_path):
    target = tmp_path / "figures.json"
    settings = ["ours:pack", "ours", "trl", "nobody"]
    flags = [
        "--precision",
        "fp32",
        "--steps",
        "4",
        "--warmup",
        "1",
        "--logging-steps",
        "1",
        "--length",
        "160",
        "--rows",
        "24",
        "--json",
        str(target),
        "--plot",
        str(tmp_path / "figures.png"),
    ]
    line = [sys.executable, "scripts/bench_train.py", "data/tiny_llama3", *settings, *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = {one["setting"]: one for one in json.loads(target.read_text())}
    assert list(figures) == settings and "error" in figures["nobody"]
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == 2 + len(settings)
    assert len({line.count("|") for line in done.stdout.splitlines()}) == 1
    for name in settings[:3]:
        assert figures[name]["tokens_per_second"] > 0 and len(figures[name]["losses"]) == 4
    # The same rows in the same order, adapters that start at zero: the first loss is the plain recipe's.
    assert math.isclose(figures["ours"]["losses"][0], figures["trl"]["losses"][0], rel_tol=1e-3)
    assert figures["ours:pack"]["tokens_per_step"] <= 160


def test_what_a_step_costs_is_measured_in_one_process(tmp_path):
    target = tmp_path / "figures.json"
    settings = ["ours:full:length=160", "ours:full:length=320", "ours:full:length=160:batch=2:rank=4", "nobody"]
    flags = ["--one-process", "--precision", "fp32", "--steps", "2", "--warmup", "1", "--rows", "4"]
    flags += ["--json", str(target), "--plot", str(tmp_path / "cost.png")]
    line = [sys.executable, "scripts/bench_train.py", "data/tiny_llama3", *settings, *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(target.read_text())
    assert [one.get("tokens_per_step") for one in figures] == [160, 320, 320, None]
    assert "error" in figures[-1]
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 2 + len(settings)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
