"""hydra/sweeper=optuna: a sweep that chooses the next values by the scores of earlier jobs."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from intern.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)


class OptunaSweeper(Sweeper):
    """Samples Hydra's sweep overrides with Optuna's TPE: lists and ranges are categories, intervals are continuous.

    Args:
        n_trials: jobs in all.
        n_jobs: jobs whose values are chosen at the same time.
        seed: of the sampler.
        params: sweep overrides, besides those of the command line.
    """

    def __init__(self, n_trials: int, n_jobs: int, seed: int | None, params: DictConfig | None) -> None:
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.seed = seed
        self.params = params if params is not None else OmegaConf.create({})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run n_trials jobs, n_jobs at a time; called by Hydra with the overrides of the command line."""
        try:
            import optuna
        except ImportError as error:
            raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'intern[optuna]'") from error
        assert self.hydra_context is not None and self.config is not None and self.launcher is not None
        fixed, space = self._split(arguments, OverridesParser.create(config_loader=self.hydra_context.config_loader))
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        for first in range(0, self.n_trials, self.n_jobs):
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - first))]
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            self.validate_batch_is_legal(jobs)
            for trial, done in zip(trials, self.launcher.launch(jobs, first), strict=True):
                score = float(done.return_value)  # NaN: the job failed
                if math.isnan(score):
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, score)

    def _split(
        self, arguments: Sequence[str], parser: OverridesParser
    ) -> tuple[list[str], "dict[str, BaseDistribution]"]:
        """Return the fixed overrides, and what is searched; of two overrides of a key the later counts."""
        given = [*(f"{key!s}={values}" for key, values in self.params.items()), *arguments]
        overrides = {override.get_key_element(): override for override in parser.parse_overrides(given)}
        searched = {key: _distribution(one) for key, one in overrides.items() if one.is_sweep_override()}
        if not searched:
            raise UserError(
                "hydra/sweeper=optuna: nothing to search; give lora.r=8,16,32 or 'trainer.learning_rate=tag(log,interval(1e-5,1e-3))'"
            )
        return [
            f"{key}={one.get_value_element_as_str()}" for key, one in overrides.items() if key not in searched
        ], searched


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        return FloatDistribution(float(value.start), float(value.end), log="log" in value.tags)
    return CategoricalDistribution(list(override.sweep_string_iterator()))
