"""Several processes that compute together, for tests: forked from one process that has the libraries loaded, which takes no seconds."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys

import torch

from intern.runs.directory import Run

LOADED = (
    *("helpers", "intern.training.finetune", "intern.display.plot", "peft.tuners.lora.bnb", "torch.distributed.nn"),
    *(
        "transformers.models.llama.modeling_llama",
        "transformers.integrations.bitsandbytes",
        "transformers.quantizers.auto",
    ),
)
torch.set_num_threads(1)
gc.freeze()  # in the process that is forked: collecting what it has would copy all of its memory


def in_processes(work, path, *arguments, count=2):
    """Calls `work(*arguments)` in processes joined as torchrun would join them.

    Returns for each what it returned (as JSON holds it), the name and text of its exception, or its exit code, negative after a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LOADED, "together"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path.mkdir(parents=True, exist_ok=True)
    files = [path / f"outcome-{rank}.json" for rank in range(count)]
    started = [
        context.Process(target=_one, args=(work, arguments, file, rank, count, port)) for rank, file in enumerate(files)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    outcomes = [
        json.loads(file.read_text()) if file.exists() else process.exitcode
        for file, process in zip(files, started, strict=True)
    ]
    for file in files:
        file.unlink(missing_ok=True)
    return outcomes


def _one(work, arguments, file, rank, count, port):
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with (file.with_suffix(".log")).open("w") as messages:
        os.dup2(messages.fileno(), sys.stdout.fileno())
        os.dup2(messages.fileno(), sys.stderr.fileno())
    try:
        file.write_text(json.dumps(work(*arguments)))
    except Exception as error:
        file.write_text(json.dumps(f"{type(error).__name__}: {error}"))


def train(path, cfg, event=None, rank=1, step=3):
    """Trains one process's part of a run; `event` happens to process `rank` at the end of `step`."""
    from intern import processes
    from intern.training.finetune import finetune
    from intern.training.health import Health

    usual = Health.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and processes.place().rank == rank:
            if event in ("SIGKILL", "SIGTERM"):
                os.kill(os.getpid(), getattr(signal, event))
            elif event == "weights":
                next(one for one in kwargs["model"].parameters() if one.requires_grad).data.add_(1)
            elif event is not None:
                raise RuntimeError(event)
        return usual(self, args, state, control, **kwargs)

    Health.on_step_end = on_step_end
    return finetune(cfg, Run(path))


def peak(fails_in):
    """What the memory probe measures if a step runs out of memory in process `fails_in` alone, and else."""
    from intern import processes
    from intern.memory.probe import Probe

    processes.join(use_cpu=True, timeout_s=60)
    probe = Probe.__new__(Probe)
    probe.model = torch.nn.Linear(1, 1)
    rank = processes.place().rank

    def step(rows):
        if rank == fails_in:
            raise torch.cuda.OutOfMemoryError

    probe._whole_step = step
    torch.cuda.max_memory_allocated = lambda: 100 + rank
    found = probe.peak([])
    processes.leave()
    return found
