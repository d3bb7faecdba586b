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
    for name in settings[:3]:
        assert figures[name]["tokens_per_second"] > 0 and len(figures[name]["losses"]) == 4
    # The same rows in the same order, adapters that start at zero: the first loss is the plain recipe's.
    assert math.isclose(figures["ours"]["losses"][0], figures["trl"]["losses"][0], rel_tol=1e-3)
    assert figures["ours:pack"]["tokens_per_step"] <= 160
