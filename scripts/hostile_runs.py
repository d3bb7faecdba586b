"""python scripts/hostile_runs.py FOLDER [--hostile 200] [--good 20]

Writes a folder of good and hostile runs, compares it, and prints how long that took and the peak memory.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

CONFIG = (
    "seed: 1\nlora: {r: %d, lora_alpha: 16}\ntrainer: {learning_rate: 0.001}\ndata: {train_file: /t, eval_file: /g}\n"
)
METRICS = {"train_loss": 2.0, "eval_loss": 1.0, "eval_rows": 100, "train_seconds": 60.5, "peak_host_rss_gib": 1.0}
DIGITS = "9" * 400


def good(folder: Path, number: int = 8) -> None:
    """Write what a comparison reads of a finished run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG % number)
    (folder / "metrics.json").write_text(json.dumps(METRICS | {"eval_loss": 1 + number / 100}))
    (folder / "environment.json").write_text(json.dumps({"data": {"/t": "a", "/g": "b"}, "gpu": None}))
    (folder / "history.jsonl").write_text('{"step": 1, "optimizer_steps": 1, "loss": 3.0}\n' * 50)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def _sparse(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def _deep(file: Path) -> None:
    file.write_text("a: " + "[" * 20_000 + "]" * 20_000)


def _aliases(file: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghij"
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    file.write_text("\n".join(lines))


# Each makes a good run hostile: file -> what is put in its place.
KINDS = (
    ("config.yaml", _aliases),
    ("config.yaml", _pipe),
    ("config.yaml", lambda file: _link(file, "/dev/zero")),
    ("config.yaml", lambda file: _sparse(file, 2**40)),
    ("config.yaml", _deep),
    ("config.yaml", lambda file: file.write_text("a: !!python/object/apply:os.system ['true']")),
    ("config.yaml", lambda file: file.write_text("".join(f"k{n}: {n}\n" for n in range(12_000)))),
    ("config.yaml", lambda file: file.write_text("lora: {r: " + DIGITS + ", lora_alpha: .inf}\n")),
    ("config.yaml", lambda file: file.write_bytes(bytes(range(256)) * 100)),
    ("config.yaml", lambda file: file.write_text("seed: 1\nlora: 7\ntrainer: {}\n'': {'': {'': x}}\n")),
    ("metrics.json", _pipe),
    ("metrics.json", lambda file: _link(file, "/proc/self/mem")),
    ("metrics.json", lambda file: file.write_text('{"eval_loss": ' + DIGITS + "}")),
    ("metrics.json", lambda file: file.write_text('{"eval_loss": 1e308, "train_seconds": -1e308}')),
    ("metrics.json", lambda file: file.write_text('{"eval_loss": NaN}')),
    ("metrics.json", lambda file: file.write_text("[" * 100_000)),
    ("metrics.json", lambda file: file.write_text(json.dumps({"eval_loss": {"a": [1]}, "train_loss": True}))),
    ("metrics.json", lambda file: _sparse(file, 2**40)),
    ("metrics.json", lambda file: file.write_text('{"x": "' + "\\u001b[2J" * 1_000_000 + '"}')),
    ("environment.json", lambda file: file.write_text('{"data": [1], "gpu": {"name": {"a": "\\u202e"}}}')),
    ("environment.json", _pipe),
    ("history.jsonl", lambda file: file.write_text('{"step": 1, "optimizer_steps": 1, "loss": 1e308}\n' * 200_000)),
    ("history.jsonl", lambda file: _sparse(file, 2**40)),
    ("history.jsonl", lambda file: file.write_text('{"step": ' + DIGITS + ', "loss": 3.0}\n')),
    ("history.jsonl", _pipe),
)
NAMES = (
    "=1+1",
    "+A1",
    "@SUM(A1)",
    "<img src=x>",
    "a|b",
    "`id`",
    "\x1b[2J",
    "\u202egpj",
    "$HOME",
    "[x](http:y)",
    "-rf",
    "a\nb",
)


def write(folder: Path, hostile: int, fine: int, seed: int = 1) -> None:
    """Write the folder; every kind of hostility comes in turn, under a name that may be hostile too."""
    chance = random.Random(seed)
    for number in range(fine):
        good(folder / f"good{number}", number + 1)
    for number in range(hostile):
        file, spoil = KINDS[number % len(KINDS)]
        run = folder / f"{chance.choice(NAMES)} {number}"
        good(run)
        spoil(run / file)
        if chance.random() < 0.2:
            place = run / "evaluation" / "golden" / "metrics.json"
            place.parent.mkdir(parents=True)
            place.write_text(chance.choice(["[" * 5_000, '{"groups": [{"scores": 1}]}', '{"groups": [[]]}', "x"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--good", type=int, default=20)
    asked = parser.parse_args()
    write(asked.folder / "runs", asked.hostile, asked.good)
    start = time.monotonic()
    line = [
        sys.executable,
        "-m",
        "intern.compare",
        f"runs={asked.folder}/runs",
        f"output_dir={asked.folder}/comparison",
    ]
    done = subprocess.run([*line, "top=1000"], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    listed = sum(f"good{number} " in done.stdout for number in range(asked.good))
    print(done.stderr, end="", file=sys.stderr)
    print(
        f"exit code {done.returncode}, {listed} of {asked.good} good runs listed, {seconds:.1f} s, peak {peak:,.0f} MiB"
    )
    sys.exit(0 if done.returncode == 0 and listed == asked.good else 1)


if __name__ == "__main__":
    main()
