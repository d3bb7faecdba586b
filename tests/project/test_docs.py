"""The documentation: its commands run or compose, its keys and links exist, the source tree is the real one, the site builds."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import pytest
from helpers import ROOT, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import OmegaConf
from tiny_families import FAMILIES

from intern.cli.arguments import quoted

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FREE_TEXT = ("question", "context")
EXTERNAL = {"hf", "wandb", "git", "cd", "pip", "eval", "torchrun"}
# What cannot run here is composed by Hydra only, so that a key that was renamed still fails.
NEEDS_MORE = {
    "model": "a model from the hub",
    "quant": "a GPU",
    "trainer": "a GPU",
    "judge.url": "a server",
    "server": "a server",
    "repo": "the hub",
    "harness.tasks": "tasks from the hub",
    "hydra/launcher": "GPUs, SLURM or more processes",
    "base_model": "a run from another machine",
    "num_processes": "processes of its own (tests/training/test_process_commands.py runs them)",
    "model.pretrained_model_name_or_path": "a model",
    "trainer.activation_checkpointing": "a GPU",
}
TINY = [
    *("experiment=tiny_cpu", "logger=none", "data.eval_file=golden.jsonl", "data.train_file=mine.jsonl"),
    *("trainer.max_steps=1", "trainer.min_steps=1", "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.eval_steps=1"),
]  # fmt: skip
BRIEF = {  # what makes the other commands short; a command of the docs that gives one of these keys keeps its own
    "query": ["generation.max_new_tokens=4"],
    "evaluate": ["generation.max_new_tokens=4", "resamples=100"],
    "compare": [],
    "preview": [*TINY[:1], *TINY[2:4], "lengths=null"],
    "doctor": [*TINY[:4]],
    "runs": [],
    "export": ["prompts=2", "max_new_tokens=4"],
}


# --- what the pages say


@dataclass(frozen=True)
class Command:
    """A command as a page shows it, without variables of the environment before it."""

    page: str
    words: tuple[str, ...]

    @property
    def module(self):
        """train, query ...; None for anything else than `python -m intern.X`."""
        name = self.words[2] if self.words[:2] == ("python", "-m") else ""
        return name.removeprefix("intern.") if name.startswith("intern.") else None

    @property
    def overrides(self):
        return [one for one in self.words[3:] if "=" in one and not one.startswith("-")]

    @property
    def keys(self):
        return [one.partition("=")[0].lstrip("+~") for one in self.overrides]

    def __str__(self):
        return f"{self.page}: {shlex.join(self.words)}"


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every command line of the bash blocks, and every command between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`([^`\n]+)`", without_fences(text))
        lines += [
            line for line in inline if re.match(r"(\w+=\S+ )*(python -m intern\.|python scripts/|pytest |make )", line)
        ]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(Command(page.relative_to(ROOT).as_posix(), tuple(words)))
    return list(dict.fromkeys(found))


def test_the_pages_have_commands_of_every_kind():
    shown = {command.module for command in commands()}
    assert shown >= {"train", "query", "evaluate", "compare", "preview", "doctor", "verify", "runs", "export"}
    assert len(commands()) > 60


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# --- commands that are not this project's


def test_make_targets_extras_scripts_and_test_files_of_the_pages_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    faults = []
    for command in commands():
        first, *rest = command.words
        if first == "make":
            missing = [one for one in rest if one not in targets]
        elif first in ("python", "PYTHON") and rest[0].startswith("scripts/"):
            script = ROOT / rest[0]
            text = script.read_text(encoding="utf-8") if script.is_file() else ""
            missing = [] if text else [rest[0]]
            missing += [one for one in rest[1:] if re.fullmatch(r"--[a-z-]+", one) and f'"{one}"' not in text]
        elif first == "pytest":
            missing = missing_tests(rest)
        else:
            missing = [] if command.module or first in EXTERNAL else [first]
        faults += [f"{command}: {one}" for one in missing]
    assert not faults, "\n".join(faults)


def missing_tests(words):
    paths = [one for one in words if one.startswith("tests/")]
    if missing := [one for one in paths if not (ROOT / one).exists()]:
        return missing
    if "-k" not in words:
        return []
    wanted = words[words.index("-k") + 1]
    names = [
        node.name
        for path in paths
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    return [] if any(wanted in name for name in names) else [f"-k {wanted}"]


def test_extras_of_the_pages_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        name for page in PAGES for name in re.findall(r"pip install[^`\n]*\[(\w+)\]", page.read_text(encoding="utf-8"))
    }
    assert named and named <= set(extras)


# --- commands of this project


def one_of_each(command):
    """A command's overrides as Hydra composes one job of them: free text quoted, the first value of each sweep."""
    texts = [
        quoted(key, value) if key in FREE_TEXT and command.module == "query" else f"{key}={value}"
        for key, _, value in (one.partition("=") for one in command.overrides)
    ]
    for text, override in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        if not override.is_sweep_override():
            yield text
        elif isinstance(override.value(), IntervalSweep):
            yield f"{override.get_key_element()}={override.value().start}"
        else:
            yield f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


@pytest.mark.parametrize(
    "name", ["train", "query", "evaluate", "compare", "preview", "doctor", "verify", "runs", "export"]
)
def test_every_command_of_the_pages_composes(name):
    faults = []
    for command in commands():
        if command.module == name:
            try:
                OmegaConf.to_container(composed(*one_of_each(command), name=name), resolve=False)
            except Exception as error:  # whatever Hydra finds: all faults are shown at once
                faults.append(f"{command}: {' '.join(str(error).split())[:200]}")
    assert not faults, "\n".join(faults)


def test_keys_and_options_in_the_text_of_the_pages_exist():
    """`trainer.max_steps=300`, `quant=nf4_bf16` and the like, between backticks."""
    primary = [
        composed(name=name)
        for name in ("train", "query", "evaluate", "compare", "preview", "doctor", "verify", "runs", "export")
    ]
    faults = []
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", without_fences(page.read_text(encoding="utf-8"))):
            for key, value in re.findall(r"(?:^| )([a-z_][\w./]*)=([\w\[\],.]*)(?= |$)", span):
                group = ROOT / "conf" / key
                if group.is_dir():
                    options = value.strip("[]").split(",") if value else []
                    known = all((group / f"{one}.yaml").is_file() for one in options)
                else:
                    known = any(has_key(cfg, key) for cfg in primary) or key.startswith(("hydra.", "generation."))
                if not known and " -m " not in span and not span.startswith(("python", "PYTHON")):
                    faults.append(f"{page.relative_to(ROOT)}: `{span}`: {key}={value}")
    assert not faults, "\n".join(faults)


def has_key(cfg, key):
    *path, last = key.split(".")
    node = OmegaConf.select(cfg, ".".join(path)) if path else cfg
    return node is not None and OmegaConf.is_dict(node) and last in node


def kind(command):
    """Commands that take the same way through the code: only one of each is run."""
    if command.module != "train":
        kinds = {"against", "html", "row", "format", "sort_by", "show", "pack", "remove", "keep_best", "gpu"}
        return (command.module, *sorted(kinds & set(command.keys)))
    words = " ".join(command.words)
    marks = ("--multirun", "--cfg", "resume=", "rank_sweep", "optuna", "eval_strategy", "mine.jsonl", "max_steps=300")
    return ("train", *(mark for mark in marks if mark in words))


def shortened(command):
    """The same command with other values, so that it takes seconds."""
    named = [words_for_here(one) for one in command.words[3:]]
    if "--cfg" in command.words:
        return named
    if command.module == "train" and "resume" in command.keys:
        return [one.replace("max_steps=300", "max_steps=2") for one in named]
    added = list(TINY if command.module == "train" else BRIEF[command.module])
    if command.module == "train":
        named = [re.sub(r"^(lora\.r=\d+|trainer\.learning_rate=[\de.-]+),.*", r"\1", one) for one in named]
        named = [
            re.sub(r"n_trials=\d+", "n_trials=1", one) for one in named if not one.startswith("trainer.max_steps=")
        ]
        if "rank_sweep" in " ".join(named):
            named = [one for one in named if not one.startswith("experiment=")]
            added = ["experiment=[tiny_cpu,rank_sweep]", "lora.r=4", *TINY[1:]]
            added += [] if "trainer.learning_rate" in command.keys else ["trainer.learning_rate=1e-3"]
    if "gpu" in command.keys:  # a plan for a card is none for the CPU
        added = ["model=tiny", *added[1:]]
    if "data.eval_share" in command.keys:  # golden rows are held out: no file has them
        added = [one for one in added if not one.startswith("data.eval_file")]
    if {"remove", "keep_best"} & set(command.keys):
        added.append("yes=true")
    if "against" in command.keys:  # the newest run is the one that it is compared with
        named = [one.replace("run_dir=latest", "run_dir=multirun/first") for one in named]
    given = {one.partition("=")[0] for one in named}
    return named + [one for one in added if one.partition("=")[0] not in given - {"data.eval_file"}]


def words_for_here(word):
    """Folders that a page makes up -> the ones that the first commands here have written."""
    word = re.sub(r"outputs/(DATE/TIME|2025-01-31/10-15-00)", "outputs/first", word)
    return re.sub(r"multirun/(DATE/TIME|2025-01-31/\S+)", "multirun/first", word)


RUNNER = """
import importlib, json, logging, shutil, sys, time
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

for module, arguments, unfinished in json.load(sys.stdin):
    if unfinished:
        Path("outputs/first/metrics.json").unlink(missing_ok=True)
    start, code = time.monotonic(), 0
    sys.argv = [module, *arguments]
    try:
        importlib.import_module("intern.runs.__main__" if module == "runs" else f"intern.{module}").main()
    except SystemExit as error:
        code = error.code or 0
    from intern.cli import sweep
    sweep.record.overrides.clear(), sweep.record.failures.clear()
    GlobalHydra.instance().clear()
    print(f"RESULT {code} {time.monotonic() - start:.1f}", flush=True)
"""


def test_one_command_of_every_kind_runs(tmp_path):
    rows = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(rows[:20]), encoding="utf-8")
    rows = (ROOT / "data" / "golden_test_set.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "golden.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    chosen = {}
    for command in commands():
        invented = re.search(r"CHECKPOINT|RUN|FOLDER|_ROWS", " ".join(command.words))
        if command.module not in (None, "verify") and not invented and not NEEDS_MORE.keys() & set(command.keys):
            chosen.setdefault(kind(command), command)
    order = ["train", "query", "evaluate", "compare", "preview", "doctor", "runs", "export"]
    todo = sorted(
        chosen.values(), key=lambda one: (order.index(one.module), "resume" in one.keys, "--multirun" in one.words)
    )
    calls, folders = [], iter(["outputs/first"])
    for command in todo:
        arguments = shortened(command)
        if command.module == "train" and "resume" not in command.keys and "--cfg" not in command.words:
            if "--multirun" not in command.words:
                arguments += [f"hydra.run.dir={next(folders, f'outputs/{len(calls)}')}"]
            elif not any(one.startswith("hydra.sweep.dir") for one in arguments):
                arguments += [
                    f"hydra.sweep.dir=multirun/{'first' if not any('multirun/' in str(call) for call in calls) else len(calls)}"
                ]
        if command.module == "query":
            arguments = [quoted(*one.split("=", 1)) if one.split("=")[0] in FREE_TEXT else one for one in arguments]
        calls.append((command.module, arguments, "resume" in command.keys and "trainer.max_steps" not in command.keys))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(calls), cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    results = re.findall(r"^RESULT (\S+) (\S+)$", done.stdout, re.MULTILINE)
    told = "\n".join(f"{code} {seconds} s  {command}" for (code, seconds), command in zip(results, todo, strict=False))
    assert len(results) == len(todo), f"{told}\n{done.stderr[-8000:]}"
    assert {code for code, _ in results} == {"0"}, f"{told}\n{done.stderr[-8000:]}"


# --- links, the tree, the site


def headings(page):
    text = without_fences(page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def test_links_between_the_pages_lead_somewhere():
    faults = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text(encoding="utf-8"))):
            target, _, anchor = link.partition("#")
            if target.startswith("http"):
                continue
            file = (page.parent / target).resolve() if target else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                faults.append(f"{page.relative_to(ROOT)}: {link}")
    assert not faults, "\n".join(faults)


def test_files_that_the_pages_name_exist():
    faults = []
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", without_fences(page.read_text(encoding="utf-8"))):
            path = re.fullmatch(r"(?:intern|conf|scripts|tests|hydra_plugins|docs|data)/[\w./-]*", span)
            if path and not (ROOT / span).exists():
                faults.append(f"{page.relative_to(ROOT)}: {span}")
    assert not faults, "\n".join(faults)


def test_the_table_of_families_lists_those_that_are_tested():
    rows = re.findall(
        r"^\| .* <!-- (\w+) --> (.*)$", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows] == list(FAMILIES)
    assert {cells for _, cells in rows} == {"| ✓ | ✓ | ✓ | ✓ | ✓ | ✓ |"}


def test_the_source_tree_in_the_architecture_page_is_the_real_one():
    line = [sys.executable, "scripts/source_tree.py", "--check"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    line = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(name in api for name in ("query_intern", "Intern", "Run", "finetune"))
