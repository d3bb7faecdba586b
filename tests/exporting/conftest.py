"""A run's loaded model and what it answers, made once for all tests of exports."""

import dataclasses

import pytest
from helpers import composed

from intern.config.build import plain
from intern.exporting.job import build_job
from intern.exporting.reference import build_reference
from intern.exporting.settings import read_settings
from intern.runs.directory import Run


def settings_of(run, out, **keys):
    """Checked settings as the command makes them."""
    values = {key: value for key, value in plain(composed(name="export")).items() if key != "run_dir"}
    return read_settings(
        values | {"out": out if out is None else str(out), "prompts": 6, "max_new_tokens": 24} | keys, run
    )


@pytest.fixture(scope="session")
def loaded(trained_run, tmp_path_factory):
    """The run's job and the reference of its exports."""
    run = Run(trained_run)
    settings = settings_of(run, tmp_path_factory.mktemp("nothing") / "out")
    job = build_job(run, settings)
    return job, build_reference(job.loaded, None, settings.prompts, settings.max_new_tokens)


@pytest.fixture
def job(loaded):
    """A job of its own, whose settings a test may change, with the model that all tests share."""
    return dataclasses.replace(loaded[0])


@pytest.fixture
def reference(loaded):
    return loaded[1]
