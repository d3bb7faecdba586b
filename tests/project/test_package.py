"""The built wheel, installed elsewhere, runs every command from another directory."""

import os
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, SHORT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(line, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_carries_configuration_and_data_and_no_runs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hydra_plugins/intern_launcher.py", "intern/_project/conf/hydra/launcher/gpus.yaml"} <= set(names)
    assert {
        "intern/_project/conf/train.yaml",
        "intern/_project/data/train.jsonl",
        "intern/_project/data/tiny_llama3/model.safetensors",
    } <= set(names)
    assert not [name for name in names if "outputs/" in name or "multirun/" in name or name.startswith("tests/")]


def test_every_command_runs_from_an_installed_wheel_in_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    # The libraries come from the running environment; only the project itself is installed.
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    work = tmp_path / "work"
    work.mkdir()

    def run(name, *arguments):
        code = f"import sys; sys.path.insert(0, {str(site)!r}); import intern.{name} as m; assert m.__file__.startswith({str(site)!r}); m.main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", *SHORT, "logger=none")
    assert [path.name for path in work.iterdir()] == ["outputs"]
    assert run("query", "question=Why?", "generation.max_new_tokens=8").strip()
    assert run("evaluate", "generation.max_new_tokens=8").startswith("| golden rows |")
    assert run("runs.__main__").startswith("| run |")
    assert run("compare").startswith("| run |")
    assert "| green |" in run("doctor", "experiment=tiny_cpu")
    assert "all marked seen_chunk" in run("preview", "experiment=tiny_cpu")
    scripts = {path.name for path in (site / "bin").iterdir()}
    names = ("train", "query", "evaluate", "compare", "preview", "doctor", "verify", "runs", "export")
    assert scripts == {f"intern-{name}" for name in names}
