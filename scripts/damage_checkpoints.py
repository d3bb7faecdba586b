"""python scripts/damage_checkpoints.py: damages the checkpoints of a toy run in every way of a list, and resumes each damaged run.

A run of the toy is trained straight: that is how every other one must end. Each damage is then done to two copies of it as a kill after its
second checkpoint would have left it:
- "newest": one file of the newest checkpoint is damaged. The resumed run must end bit for bit like the straight one.
- "only": the same, and there is no older checkpoint. The run must be refused in one line that names the file, and nothing in its folder may
  change.
The history is damaged too, next to whole checkpoints. Exit code 1 if a damage was not noticed.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # for the forks

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from intern.display.table import show
from intern.errors import UserError
from intern.inspection.resume_check import diff_runs, stop_after
from intern.paths import CONF_DIR
from intern.runs.directory import Run

STEPS, SAVE = 6, 2
REFUSED = 3  # exit status of a process whose run was refused; its message is in the log


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _one_byte_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _zeroed(path: Path) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def _another_type(path: Path) -> None:
    path.write_text("[]" if path.suffix != ".json" else "no JSON")


def _empty_object(path: Path) -> None:
    path.write_text("{}")


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.parents[2] / path.name)
    path.symlink_to(path.parents[2] / path.name)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _extra(path: Path) -> None:
    shutil.copy(path, path.with_name(f"more_{path.name}"))


# What can happen to a file of a checkpoint; each changes the file that it is given.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncated,
    "one byte short": _one_byte_short,
    "second half zeroed": _zeroed,
    "one flipped byte": _flipped,
    "empty": _empty,
    "one byte longer": _longer,
    "another type": _another_type,
    "an empty JSON object": _empty_object,
    "missing": _missing,
    "a folder": _folder,
    "a link": _link,
    "a pipe": _pipe,
    "a second file": _extra,
}
# What can happen to the lines of history.jsonl before a resume.
HISTORIES: dict[str, Callable[[list[str]], list[str]]] = {
    "a line twice": lambda lines: [lines[0], *lines],
    "a line missing": lambda lines: lines[1:],
    "reversed": lambda lines: lines[::-1],
    "a foreign line": lambda lines: ['{"step": 1, "optimizer_steps": 1, "skipped_steps": 0, "loss": 99.0}\n', *lines],
    "a changed loss": lambda lines: [line.replace('"loss": ', '"loss": 1') for line in lines],
    "empty": lambda lines: [],
    "no text": lambda lines: ["\0\n", "[1, 2]\n", *lines],
}


def configuration() -> DictConfig:
    overrides = ["experiment=tiny_cpu", "logger=none", "data.eval_file=null", "trainer.min_steps=0"]
    overrides += [f"trainer.max_steps={STEPS}", f"trainer.save_steps={SAVE}", "trainer.save_total_limit=null"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=[*overrides, "trainer.logging_steps=1", "lora.lora_dropout=0.1"])


def train(run: Run, log: Path) -> int:
    """Train or resume in a process of its own; return its exit status: 0, REFUSED, or 1 for a crash."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            from intern.training.finetune import finetune

            run.path.mkdir(exist_ok=True)
            finetune(configuration(), run)
            code = 0
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            code = REFUSED
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(folder: Path) -> dict[str, str]:
    """Return a hash of every file in a folder, by its path; of what is no regular file, its kind."""
    kinds = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        content = path.read_bytes() if regular else b"folder" if path.is_dir() else b"special"
        kinds[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return kinds


def stopped(reference: Run, path: Path, steps: tuple[int, ...]) -> Run:
    """Return a copy of a run as a kill after the last of these checkpoints would have left it."""
    run = Run(path)
    path.parent.mkdir(exist_ok=True)
    for step in steps:
        stop_after(reference, step, run)
    return run


def ends_like(reference: Run, run: Run, log: Path) -> str | None:
    """Resume a run; return what is wrong with its end, None if nothing is."""
    if (code := train(run, log)) != 0:
        return f"exit status {code}: {log.read_text().strip().splitlines()[-1]}"
    differ = [part.name for part in diff_runs(reference, run, STEPS) if part.differ]
    losses = [one.read_json(one.metrics)["train_loss"] for one in (reference, run)]
    return f"{', '.join(differ)} differ" if differ else None if losses[0] == losses[1] else "train_loss differs"


def is_refused(run: Run, name: str, log: Path) -> str | None:
    """Resume a run that has nothing to resume from; return what is wrong with its refusal, None if nothing is."""
    before = fingerprint(run.path)
    code, said = train(run, log), log.read_text().strip().splitlines()[-1]
    if code != REFUSED or name not in said:
        return f"exit status {code}: {said}"
    return None if fingerprint(run.path) == before else "its folder has changed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", help="only these files of a checkpoint")
    parser.add_argument("--damages", nargs="+", choices=list(DAMAGES), default=list(DAMAGES))
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="damaged-"))
    log = folder / "process.log"
    import intern.training.finetune  # noqa: F401  # loaded once, for all the forks

    reference = Run(folder / "straight")
    assert train(reference, log) == 0, log.read_text()
    newest = f"checkpoint-{2 * SAVE}"
    files = arguments.files or sorted(path.name for path in (reference.checkpoints / newest).iterdir())
    done: Counter[str] = Counter()
    faults = []
    for file in files:
        for damage in arguments.damages:
            for kind, steps in (("newest", (SAVE, 2 * SAVE)), ("only", (2 * SAVE,))):
                run = stopped(reference, folder / "damaged" / "run", steps)
                DAMAGES[damage](run.checkpoints / newest / file)
                fault = ends_like(reference, run, log) if kind == "newest" else is_refused(run, file, log)
                if fault is None and kind == "newest" and file not in log.read_text():
                    fault = "no line named it"
                done[kind] += 1
                if fault is not None:
                    faults.append(f"{file}, {damage}, {kind}: {fault}")
                shutil.rmtree(folder / "damaged")
    for change, damaged in HISTORIES.items():
        run = stopped(reference, folder / "damaged" / "run", (SAVE, 2 * SAVE))
        run.history.write_text("".join(damaged(run.history.read_text().splitlines(keepends=True))))
        if (fault := ends_like(reference, run, log)) is not None:
            faults.append(f"history.jsonl, {change}: {fault}")
        done["history"] += 1
        shutil.rmtree(folder / "damaged")
    show(
        ["damaged", "resumed", "as it must be"],
        [
            [
                f"a file of the newest checkpoint ({len(files)} files)",
                str(done["newest"]),
                "ends like the straight run",
            ],
            ["the same file of the only checkpoint", str(done["only"]), "refused, naming the file; nothing changed"],
            ["lines of history.jsonl", str(done["history"]), "ends like the straight run, with its metrics"],
        ],
    )
    print(
        f"{sum(done.values())} damaged runs in {time.monotonic() - started:.0f} s, {len(faults)} of them not as they must be"
    )
    if faults:
        sys.exit("\n".join(faults))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
