"""What training writes is read back, and only complete files ever appear."""

import json
import os

import pytest
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.runs.directory import Run


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_json(run.metrics, {"eval_loss": 1.0})

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        run.write_json(run.metrics, {"eval_loss": 2.0})
    assert json.loads(run.metrics.read_text()) == {"eval_loss": 1.0}


def test_an_adapter_that_failed_to_save_leaves_the_old_one(tmp_path):
    run = Run(tmp_path)
    with run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("first")
    with pytest.raises(RuntimeError), run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("half")
        raise RuntimeError
    assert (run.adapter / "adapter_model.safetensors").read_text() == "first"
    with run.new_adapter() as folder:
        (folder / "adapter_model.safetensors").write_text("second")
    assert (run.adapter / "adapter_model.safetensors").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_history_leaves_out_a_line_that_a_crash_cut_short(tmp_path):
    run = Run(tmp_path)
    for step in (2, 4, 6):
        run.append_history({"step": step, "loss": 1.0 / step})
    with run.history.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [entry["step"] for entry in run.read_history()] == [2, 4, 6]
    run.write_history(run.read_history()[:2])
    assert run.history.read_text() == '{"step": 2, "loss": 0.5}\n{"step": 4, "loss": 0.25}\n'


@pytest.mark.parametrize("content", [None, "", "{", "- 1\n- 2", "a: b: c"])
def test_a_broken_configuration_is_named(tmp_path, content):
    run = Run(tmp_path)
    if content is not None:
        run.config.write_text(content)
    if content == "":
        assert run.read_config() == {}
        return
    with pytest.raises(UserError, match="config.yaml"):
        run.read_config()


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_broken_json_file_is_named(tmp_path, content):
    run = Run(tmp_path)
    if content is not None:
        run.prompt.write_text(content)
    with pytest.raises(UserError, match=r"prompt\.json"):
        run.read_json(run.prompt)


def test_a_run_does_not_choose_where_quantized_bases_are_read_or_stored(tmp_path):
    run = Run(tmp_path)
    run.write_config(OmegaConf.create({"model": {"quantized_cache": "/dev", "quantized_cache_gib": 9999}}))
    cfg = run.read_config_to_load()
    assert (cfg.model.quantized_cache, cfg.model.quantized_cache_gib) == ("~/.cache/intern/quantized", 24)
    assert run.read_config().model.quantized_cache == "/dev"
    run.write_config(OmegaConf.create({"model": {"quantized_cache": None}}))
    assert run.read_config_to_load().model.quantized_cache is None


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/checkpoint-2"])
def test_training_does_not_write_checkpoints_through_a_link(where, tmp_path):
    run = Run(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    if where == "checkpoints":
        run.checkpoints.rmdir()
    (run.path / where).symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{run.path / where}: is a link"):
        run.last_checkpoint()
