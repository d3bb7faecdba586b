"""A Hydra callback for tests: what is alive in the process after each job of a sweep, a JSON line each."""

import gc
import json
from pathlib import Path

import psutil
from hydra.experimental.callback import Callback


class MemoryProbe(Callback):
    def __init__(self, target):
        self.target = Path(target)

    def on_job_start(self, config, **kwargs):
        if config.hydra.job.num:  # the job before has ended, and so have all callbacks of its end
            self.look()

    def on_multirun_end(self, config, **kwargs):
        self.look()

    def look(self):
        import torch

        modules = sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())
        entry = {"modules": modules, "rss_mib": psutil.Process().memory_info().rss / 2**20}
        if torch.cuda.is_available():
            entry |= {
                "gpu_mib": torch.cuda.memory_allocated() / 2**20,
                "gpu_reserved_mib": torch.cuda.memory_reserved() / 2**20,
            }
        with self.target.open("a") as file:
            file.write(json.dumps(entry) + "\n")
