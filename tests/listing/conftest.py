"""What tests of runs share: the command intern.runs."""

import sys
from dataclasses import dataclass

import pytest
from hydra.core.global_hydra import GlobalHydra

from intern.runs.__main__ import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def asked(monkeypatch, capsys):
    """Runs intern.runs in a folder, in this process."""

    def run(folder, *arguments, check=True):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["intern-runs", *arguments])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        done = Done(code, *capsys.readouterr())
        assert not check or not code, done
        return done

    return run
