"""No credential of a configuration reaches a file, a tracker or the terminal."""

import os
import random
import shutil
import string
import subprocess
import sys

import pytest
from helpers import ROOT, SHORT, command, composed, inspect
from omegaconf import OmegaConf

from intern import train
from intern.comparison.reader import read_run
from intern.config.secrets import check_environment, from_environment, is_secret_name, masked, refuse, storable
from intern.errors import UserError
from intern.evaluation.judge import Judge, JudgeConfig
from intern.runs.directory import Run
from intern.runs.failures import record_failure

LETTERS = string.ascii_letters + string.digits
FORMS = {
    "Hugging Face": lambda draw: "hf_" + draw(34),
    "OpenAI": lambda draw: "sk-proj-" + draw(40),
    "Anthropic": lambda draw: f"sk-ant-api03-{draw(30)}",
    "W&B": lambda draw: "".join(c for c in draw(400).lower() if c in "0123456789abcdef")[:40],
    "GitHub": lambda draw: "ghp_" + draw(36),
    "AWS": lambda draw: "AKIA" + draw(16).upper(),
    "password in a URL": lambda draw: f"https://someone:{draw(12)}@host.example/v1",
    "token in a URL": lambda draw: f"https://{draw(24)}@host.example/v1",
    "key in a query": lambda draw: f"http://host.example/v1?x=1&api_key={draw(12)}",
    "password with a slash": lambda draw: f"http://u:{draw(5)}/{draw(6)}@host.example",
    "web token": lambda draw: f"eyJ{draw(12)}.eyJ{draw(16)}.{draw(20)}",
    "header": lambda draw: f"Bearer {draw(20)}",
}
KEYS = (
    *(
        "+trainer.run_name",
        "logger.notes",
        "logger.entity",
        "+lora.revision",
        "data.subset",
        "model.revision",
        "data.system_prompt",
    ),
    *(
        "hydra.job.name",
        "+trainer.lr_scheduler_kwargs.x",
        "logger.project",
        "data.train_file",
        "model.pretrained_model_name_or_path",
    ),
    *("--config-dir", "hydra.run.dir", "logger.tags", "+data.template_kwargs.style", "resume", "+anything"),
)
NAMES = (
    *("+trainer.hub_token", "trainer.hub_token", "++trainer.push_to_hub_token", "+logger.api_key", "+logger.apiKey", "+password"),
    *("hydra.job.env_set.HF_TOKEN", "+hydra.job.env_set.DB_PASSWORD", "+data.template_kwargs.secret", "+logger.settings.access-key"),
)  # fmt: skip


def refused(arguments, capfd, monkeypatch, folder):
    """What a training command with these arguments writes to both streams; nothing is written to a file."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train", "experiment=tiny_cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2 and not list(folder.iterdir())
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_looks_like_a_credential_is_refused_at_any_key(form, capfd, monkeypatch, tmp_path):
    chance = random.Random(form)
    for key in chance.sample(KEYS, 8):
        secret = FORMS[form](lambda count: "".join(chance.choices(LETTERS, k=count - 2)) + "A1")
        if form == "W&B" and key.endswith("revision"):
            continue  # a commit looks the same
        around = chance.choice(["{}", "{}", "text {} text", "'{}'", "[a,{}]"]) if form != "W&B" else "{}"
        shown = refused([f"{key}={around.format(secret)}"], capfd, monkeypatch, tmp_path)
        assert shown.startswith(key.lstrip("+")) and "would be stored and logged" in shown
        assert not any(secret[start : start + 8] in shown for start in range(3, len(secret) - 8))


@pytest.mark.parametrize("key", NAMES)
def test_a_key_that_is_named_like_a_credential_is_refused_with_any_value(key, capfd, monkeypatch, tmp_path):
    name, _, last = key.lstrip("+").rpartition(".")
    for argument in (
        f"{key}=Xyzzy",
        f"{key}=a,b",
        f"{key}=${{oc.env:HOME}}",
        f"+{name or 'x'}={{{last}: Xyzzy, b: 1}}",
    ):
        shown = refused([argument], capfd, monkeypatch, tmp_path)
        assert last in shown and "Xyzzy" not in shown


def test_keys_of_a_vocabulary_are_no_credentials():
    for name in ("eos_token", "pad_token", "max_new_tokens", "trainable_token_indices", "key_variable", "bos_token_id", "PWD"):  # fmt: skip
        assert not is_secret_name(name)
    for name in ("push_to_hub_token", "OPENAI_API_KEY", "apiKey", "client_secret", "DB_PASSWORD", "Authorization"):
        assert is_secret_name(name)
    refuse(
        composed("experiment=tiny_cpu", "+trainer.hub_token=null", "+trainer.eos_token=x", "data.revision=" + "a" * 40)
    )
    refuse(composed("judge.url=http://localhost:8000/v1", name="evaluate"))


def test_a_credential_in_a_file_of_the_user_is_refused_before_anything_is_stored(tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny_cpu]\ntrainer: {hub_token: Xyzzy1}\n"
    )
    for more, place in (([], "run"), (["--multirun"], "sweep")):
        folder = tmp_path / place
        line = [
            "intern.train",
            f"--config-dir={tmp_path}/conf",
            "experiment=mine",
            f"hydra.{place}.dir={folder}",
            *more,
        ]
        done = command(*line, check=False)
        assert done.returncode == 2 and done.stderr.startswith("trainer.hub_token: is a credential")
        assert "Xyzzy" not in done.stderr + done.stdout and not folder.exists()


@pytest.fixture(scope="module")
def run_from_environment(tmp_path_factory):
    """A run with texts from the environment, logged to both trackers, that stopped before its end."""
    folder = tmp_path_factory.mktemp("environment") / "run"
    line = [sys.executable, "-m", "intern.train", *SHORT, "data.eval_file=null", "trainer.max_steps=2", "trainer.min_steps=1"]  # fmt: skip
    line += [
        "trainer.save_steps=1",
        "logger=[wandb,tensorboard]",
        "logger.log_adapter=false",
        f"hydra.run.dir={folder}",
    ]
    line += ["+logger.notes=${oc.env:NOTE}", "+logger.job_type=${logger.notes}", "+trainer.run_name=a-${oc.env:NOTE}"]
    variables = os.environ | {"NOTE": "Xyzzy12345", "HF_TOKEN": "Xyzzy67890abc"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return Run(folder), done.stdout + done.stderr


def test_a_value_from_the_environment_is_used_and_stored_unresolved(run_from_environment):
    run, output = run_from_environment
    assert "Xyzzy" not in output
    holds = [file for file in run.path.rglob("*") if file.is_file() and b"Xyzzy" in file.read_bytes()]
    # W&B's notes and job type are what the user asked to send there; its configuration has the expression.
    assert {file.suffix for file in holds} <= {".wandb"}, holds
    config = run.read_config()
    assert config.logger.notes == "${oc.env:NOTE}" and config.logger.job_type == "${logger.notes}"
    assert config.trainer.run_name == "a-${oc.env:NOTE}"
    assert run.read_json(run.environment)["from_environment"] == ["logger.job_type", "logger.notes", "trainer.run_name"]
    assert "${oc.env:NOTE}" in str(inspect(run.path)["config"] if "config" in inspect(run.path) else inspect(run.path))


def test_a_resume_wants_what_came_from_the_environment_again(run_from_environment):
    from intern.training.resume import check_same, resumed_config

    run, _ = run_from_environment
    given = ["+logger.notes=${oc.env:NOTE}", "+logger.job_type=${logger.notes}", "+trainer.run_name=a-${oc.env:NOTE}"]
    os.environ["NOTE"] = "another"
    try:
        with pytest.raises(UserError, match=r"logger.job_type: was read from the environment.* 'logger.job_type=\$"):
            resumed_config(run, composed("experiment=tiny_cpu"), ["resume=x"])
        cfg = resumed_config(run, composed("experiment=tiny_cpu", *given), given)
        assert cfg.logger.job_type == "another" and cfg.trainer.run_name == "a-another"
        assert storable(cfg)["logger"] == OmegaConf.to_container(run.read_config().logger, resolve=True)
        check_same(cfg, run, {})
        with pytest.raises(UserError, match="trainer.run_name differs from what"):
            cfg.trainer.run_name = "other"
            check_same(cfg, run, {})
    finally:
        del os.environ["NOTE"]


def test_what_a_run_is_asked_with_cannot_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PLACE", "main")
    monkeypatch.setenv("RANK", "4")
    for override in (
        "model.revision=${oc.env:PLACE}",
        "data.split=${oc.env:PLACE}",
        "+lora.revision=${model.revision}",
    ):
        cfg = composed(
            "experiment=tiny_cpu", *(["model.revision=${oc.env:PLACE}"] if "lora" in override else []), override
        )
        with pytest.raises(UserError, match="comes from the environment, so its value is not stored"):
            check_environment(cfg)
    cfg = composed("experiment=tiny_cpu", "lora.r='${oc.decode:${oc.env:RANK}}'", "logger=none")
    check_environment(cfg)  # a number is stored by value
    assert storable(cfg)["lora"]["r"] == 4 and from_environment(cfg) == {}


def test_literal_texts_are_stored_as_they_are(tmp_path):
    texts = ["\\${oc.env:HOME}", "back\\\\slash", "\\${unclosed", "1e3", "no", "a: b", "x\ny"]
    cfg = OmegaConf.create({"data": {"texts": texts}, "n": 1e-5})
    run = Run(tmp_path)
    run.write_config(cfg)
    assert OmegaConf.to_container(run.read_config(), resolve=True) == OmegaConf.to_container(cfg, resolve=True)


def test_messages_and_failures_show_no_credential(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "Xyzzy12345")
    text = "GET https://me:Xyzzy@h/v1?token=Xyzzy&x=1 failed with key Xyzzy12345 and hf_ABCDEFGHIJKLMNOPQRSTUVWX of me@h.org"
    assert masked(text) == "GET https://***@h/v1?token=***&x=1 failed with key *** and *** of me@h.org"
    run = Run(tmp_path)
    with pytest.raises(RuntimeError), record_failure(run):
        raise RuntimeError(text)
    assert "Xyzzy" not in run.failure.read_text()
    program = (
        "import logging.config, yaml\n"
        "from intern.paths import CONF_DIR\n"
        "logging.config.dictConfig(yaml.safe_load((CONF_DIR / 'hydra/job_logging/stderr.yaml').read_text()))\n"
        f"logging.getLogger('intern.x').warning('%s', {text!r} + '\\n[ERROR] forged \\x1b[2J')\n"
        f"logging.getLogger('other').warning('one\\ntwo \\x9b2J')\n"
        f"try:\n    raise ValueError({text!r})\nexcept ValueError: logging.getLogger('intern').exception('failed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Xyzzy" not in done.stderr and "\x1b" not in done.stderr and "\x9b" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].endswith("me@h.org\\n[ERROR] forged \\x1b[2J") and lines[1:3] == ["one", "    two \\x9b2J"]
    assert lines[4] == "Traceback (most recent call last):"


def test_a_comparison_masks_the_credentials_of_earlier_runs(trained_run, tmp_path):

    run = Run(tmp_path / "run")
    shutil.copytree(trained_run, run.path, ignore=shutil.ignore_patterns("wandb", "checkpoints", "adapter"))
    text = run.config.read_text().replace(
        "trainer:\n", "trainer:\n  hub_token: Xyzzy1\n  note: hf_ABCDEFGHIJKLMNOPQRSTUVWX\n"
    )
    run.config.write_text(text)
    read = read_run(run.path, "run", None)
    assert (read.config["trainer.hub_token"], read.config["trainer.note"]) == ("***", "***")
    run.metrics.unlink()
    (run.path / ".hydra/overrides.yaml").write_text("- +trainer.hub_token=Xyzzy1\n- 'judge.url=http://a:Xyzzy@b'\n")
    assert read_run(run.path, "run", None).arguments == ["+trainer.hub_token=***", "judge.url=http://***@b"]


@pytest.mark.parametrize(
    "url",
    [
        "http://u:Xyzzy@host/v1",
        "u:Xyzzy@host/v1",
        "http://host/v1?Xyzzy",
        "HTTP://u:Xy@zzy@host",
        "http://[::1/?a=Xyzzy",
    ],
)
def test_a_judge_with_a_credential_in_its_address_is_refused_without_showing_it(url, tmp_path):
    settings = {"model": "m", "key_variable": "KEY", "workers": 1, "retries": 0, "timeout": 1.0}
    with pytest.raises(UserError, match=r"judge.url: holds a password or key.*judge.key_variable") as caught:
        Judge(JudgeConfig(url=url, **settings), tmp_path / "judge.jsonl")
    assert "zzy" not in str(caught.value)
    with pytest.raises(UserError, match="judge.key_variable: give the name") as caught:
        Judge(JudgeConfig(**settings | {"url": "http://host/v1", "key_variable": "my-Xyzzy"}), tmp_path / "judge.jsonl")
    assert "zzy" not in str(caught.value)
