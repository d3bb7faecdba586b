"""The commands as a shell sees them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, command

from intern.cli.arguments import check_groups
from intern.cli.help import help_text, own_keys
from intern.errors import UserError
from intern.paths import CONF_DIR

COMMANDS = sorted(path.stem for path in (ROOT / "intern").glob("*.py") if '__name__ == "__main__"' in path.read_text())
COMMANDS += [path.parent.name for path in (ROOT / "intern").glob("*/__main__.py")]


def test_there_are_commands():
    assert COMMANDS == ["compare", "doctor", "evaluate", "export", "preview", "query", "train", "verify", "runs"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name):
    module = name if (ROOT / "intern" / f"{name}.py").exists() else f"{name}.__main__"
    code = f"import sys; sys.argv = ['x', '--help']; import intern.{module} as m\ntry: m.main()\nfinally: sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Powered by Hydra" in done.stdout and f"python -m intern.{name} " in done.stdout.split("Powered by")[0]
    loaded = set(done.stderr.split())
    assert "hydra" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "wandb", "peft", "trl", "pandas", "matplotlib"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_own_key_with_a_sentence(name):
    content = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {}
    for key, value in content.items():
        if key not in ("defaults", "hydra"):
            keys |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    found = {key: comment for key, _, comment in own_keys(CONF_DIR / f"{name}.yaml")}
    assert found.keys() == {"yes" if key is True else key for key in keys} and all(
        len(text) > 10 for text in found.values()
    ), found
    said = help_text(name, "Summary.", "python -m example")
    assert all(f"  {key} " in said for key in found)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_primary_config_of_its_name(name):
    done = command(f"intern.{name}", "--cfg", "job")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "lora.rr=3",
            "lora.rr: unknown key; did you mean lora.r? (a key of the library that no group file has is added with a plus: +lora.rr=...)",
        ),
        ("loraa=qkvo", "loraa: unknown key; did you mean lora?"),
        ("lora=qkv", "qkvo"),
        ("experiment=nothing", "tiny_cpu"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(override, line):
    start = time.monotonic()
    done = command("intern.train", override, check=False)
    assert done.returncode == 2 and line in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, on Linux")
def test_a_log_file_on_a_full_disk_does_not_bury_the_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").symlink_to("/dev/full")  # every write ends with: no space left
    done = command("intern.train", "experiment=tiny_cpu", "lora.r=0", f"hydra.run.dir={tmp_path}/run", check=False)
    assert done.returncode == 2 and "lora.r=0: must be at least 1" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_hydras_full_error_shows_the_traceback():
    done = command("intern.query", "run_dir=nowhere", check=False, HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr and "no such folder" in done.stderr and done.returncode == 2


@pytest.mark.parametrize(
    "argument", ["quant=null", "lora=", "trainer=7", "+experiment=null", "hydra/launcher=null", "lora=qkvo,null"]
)
def test_a_group_that_is_given_no_name_is_one_line(argument):
    with pytest.raises(UserError, match=r"must name one of the options in conf/.*: \w+, \w+"):
        check_groups([argument])


def test_groups_and_other_keys_with_values_pass():
    check_groups(["lora=qkvo", "lora=qkvo,dora", "lora.r=8", "resume=null", "question=7", "-m", "run_dir=", "lora=[a]"])


def test_the_shell_completes_options_and_keys():
    for typed, offered in (("lora=", "lora=qkvo"), ("trainer.max_s", "trainer.max_steps="), ("exp", "experiment=")):
        line = f"intern-train {typed}"
        done = command("intern.train", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)), COMP_CWORD="1")
        assert offered in done.stdout.split(), done
