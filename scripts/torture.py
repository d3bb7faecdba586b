"""python scripts/torture.py --kills 50: kills training processes at bad moments, goes on each time, compares the end with a run left alone.

Each process is forked from this one, which has the libraries loaded, trains the toy in a run directory and is ended by SIGKILL:
- "file": at a file operation in the run directory (open, rename, remove, mkdir), each as likely as any other;
- "half": in the middle of a file of weights, optimizer or random states, or of a log line: its first half is on the disk;
- "time": whenever.
After every kill the run directory must say the truth: it is unfinished, and its last checkpoint can be read. When a run has been killed
a few times it is left to finish. Exit code 1 where a run was lost, or ended with anything else than the uninterrupted one.
"""

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # a fork takes no threads along

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from intern.display.table import show
from intern.errors import UserError
from intern.inspection.resume_check import diff_runs
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.runs.find import resolve

STEPS, SAVE = 12, 3
KINDS = ("file", "half", "time")
IN_A_ROW = 5  # kills before a run is left to finish


def configuration() -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(
            "train",
            overrides=[
                "experiment=tiny_cpu",
                "logger=none",
                "data.eval_file=null",
                f"trainer.max_steps={STEPS}",
                "trainer.min_steps=0",
                f"trainer.save_steps={SAVE}",
                "trainer.save_total_limit=2",
                "trainer.logging_steps=2",
                "lora.lora_dropout=0.1",
            ],
        )


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file_operation(run: Run, number: int) -> list[int]:
    """Ends this process before its n-th change of a file of the run (0: never); returns where the changes are counted."""
    count = [0]
    folder = str(run.path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if changes and str(arguments[0]).startswith(folder):
            count[0] += 1
            if count[0] == number:
                end()

    sys.addaudithook(hook)
    return count


def at_half_a_file(number: int) -> list[int]:
    """Ends this process in the middle of its n-th file of tensors or log line (0: never)."""
    import peft.peft_model
    import torch

    count = [0]
    append = functools.partial(_append, Run.append_history)

    def halved(write: Any) -> Any:
        def wrapped(content: Any, path: Any, *rest: Any, **kwargs: Any) -> None:
            before = (
                Path(path).stat().st_size if write is append and Path(path).exists() else 0
            )  # of a log, only its last line
            write(content, path, *rest, **kwargs)
            count[0] += 1
            if count[0] == number:
                os.truncate(path, (before + Path(path).stat().st_size) // 2)
                end()

        return wrapped

    append_half = halved(append)
    peft.peft_model.safe_save_file = halved(peft.peft_model.safe_save_file)
    torch.save = halved(torch.save)
    Run.append_history = lambda run, entry: append_half(entry, run.history)  # type: ignore[assignment, method-assign]
    return count


def _append(write: Any, entry: dict[str, Any], path: Path) -> None:
    write(Run(path.parent), entry)


def train(run: Run, kind: str, number: int, log: Path) -> tuple[int, list[int]]:
    """One training process; its exit status and, of one that was not killed, how many file operations and half files there were."""
    run.path.mkdir(exist_ok=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            counted = [at_file_operation(run, number * (kind == "file")), at_half_a_file(number * (kind == "half"))]
            from intern.training.finetune import finetune

            finetune(configuration(), run)
            os.write(write, " ".join(str(count[0]) for count in counted).encode())
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    if kind == "time":
        time.sleep(number / 1000)  # the moment of the kill, in milliseconds
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        counts = [int(word) for word in pipe.read().split()]
    return os.waitstatus_to_exitcode(status), counts


def untruth(run: Run) -> str | None:
    """What a killed run says of itself that is not so."""
    try:
        resolve(run.path)
        if not run.finished:
            return "an unfinished run was taken for a finished one"
    except UserError:
        pass
    if run.finished and not (run.adapter / "adapter_model.safetensors").is_file():
        return "a run without adapter says that it is finished"
    if [entry["step"] for entry in run.read_history()] != sorted(entry["step"] for entry in run.read_history()):
        return "the history goes back"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    log = folder / "processes.log"
    import intern.training.finetune  # noqa: F401  # loaded once, for all the forks

    reference = Run(folder / "reference")
    started = time.monotonic()
    code, (operations, files) = train(reference, "none", 0, log)
    assert code == 0, log.read_text()
    most = {"file": operations, "half": files, "time": int(1000 * (time.monotonic() - started))}
    kills: Counter[str] = Counter()
    lost, worst, runs, faults = 0, 0, 0, []
    while sum(kills.values()) < arguments.kills:
        run = Run(folder / f"run-{runs}")
        runs += 1
        in_a_row = 0
        while not run.finished:
            kind = chance.choice(arguments.kinds)
            spared = in_a_row >= IN_A_ROW or sum(kills.values()) >= arguments.kills
            code, _ = train(run, "none" if spared else kind, chance.randint(1, most[kind]), log)
            if code == -signal.SIGKILL:
                kills[kind] += 1
                in_a_row += 1
                if (fault := untruth(run)) is not None:
                    faults.append(f"{run.path}: {fault}")
                checkpoint = run.last_checkpoint()
                steps = max([entry["step"] for entry in run.read_history()], default=0)
                again = max(0, steps - (int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0))
                lost, worst = lost + again, max(worst, again)
            elif code != 0:
                sys.exit(f"{run.path}: training ended with exit code {code}: see {log}")
        faults += [f"{run.path}: {part.name} differs" for part in diff_runs(reference, run, STEPS) if part.differ]
        leftovers = [path.name for path in run.path.iterdir() if path.name.startswith(".")]
        faults += [f"{run.path}: {name} was left behind" for name in leftovers]
    show(
        ["killed at", "processes"],
        [[name, str(kills[name])] for name in arguments.kinds] + [["all", str(sum(kills.values()))]],
    )
    print(f"{runs} runs finished; logged steps computed again: {lost}, at most {worst} after one kill")
    if faults:
        sys.exit("\n".join(faults))
    print("every adapter, optimizer state and history equals the uninterrupted run's bit for bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
