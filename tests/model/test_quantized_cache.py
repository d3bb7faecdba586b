"""A base that was quantized before is read from the cache, bit for bit the same."""

import shutil

import pytest
import torch
from helpers import ROOT
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import intern.model.quantized_cache
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.preload import BASE_FILE
from intern.model.quant import FourBit
from intern.runs.directory import Run

PRECISION = Precision("cpu", torch.float32, False, False)
QUANT = FourBit(
    BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
)
FP4 = FourBit(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32))


def base(cache, gib=1, name=ROOT / "data/tiny_llama3"):
    node = {"pretrained_model_name_or_path": str(name), "attn_implementation": "isolated"}
    return Base(OmegaConf.create(node | {"quantized_cache": str(cache), "quantized_cache_gib": gib}))


def entries(cache):
    return sorted(path for path in cache.iterdir())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).reshape(1, 40)).logits


def test_the_second_load_reads_the_cache_and_gives_the_same_model(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = base(cache).load(QUANT, PRECISION)
    [entry] = entries(cache)
    assert (entry / BASE_FILE).read_text() == str(ROOT / "data/tiny_llama3")
    read = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **more: read.append(path) or real(path, **more)
    )
    second = base(cache).load(QUANT, PRECISION)
    assert read == [entry]
    assert torch.equal(logits(first), logits(second))
    theirs = second.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())
    assert second.name_or_path == str(ROOT / "data/tiny_llama3")
    layer = second.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float32 and layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("change", ["quantization", "weights", "dtype"])
def test_another_quantization_other_weights_or_another_dtype_are_another_entry(change, tmp_path):
    cache, copy = tmp_path / "cache", tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny_llama3", copy)
    base(cache, name=copy).load(QUANT, PRECISION)
    quant, precision = QUANT, PRECISION
    if change == "quantization":
        quant = FP4
    elif change == "dtype":
        precision = Precision("cpu", torch.bfloat16, False, False)
    else:
        (copy / "model.safetensors").touch()
    base(cache, name=copy).load(quant, precision)
    assert len(entries(cache)) == 2


def test_a_damaged_entry_is_quantized_again(tmp_path, caplog):
    expected = logits(base(tmp_path).load(QUANT, PRECISION))
    [entry] = entries(tmp_path)
    weights = entry / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert torch.equal(logits(base(tmp_path).load(QUANT, PRECISION)), expected)
    assert "quantizing again" in caplog.text and entries(tmp_path) == [entry]


def test_a_kill_while_an_entry_is_written_leaves_none(tmp_path, monkeypatch):
    def killed(self, folder, **more):
        (intern.model.quantized_cache.Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", killed)
        patch.setattr(
            intern.model.quantized_cache.shutil, "rmtree", lambda *a, **k: None
        )  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            base(tmp_path).load(QUANT, PRECISION)
    [draft] = entries(tmp_path)
    assert draft.name.startswith(".draft-")
    monkeypatch.setattr(intern.model.quantized_cache, "_OLD", -1)
    base(tmp_path).load(QUANT, PRECISION)
    [entry] = entries(tmp_path)
    assert entry != draft and (entry / "config.json").is_file()


def test_the_entry_that_was_not_used_for_the_longest_time_goes_first(tmp_path, caplog):
    base(tmp_path).load(QUANT, PRECISION)
    [old] = entries(tmp_path)
    size = sum(file.stat().st_size for file in old.iterdir())
    base(tmp_path, gib=1.5 * size / 2**30).load(FP4, PRECISION)
    [new] = entries(tmp_path)
    assert new != old
    base(tmp_path, gib=0.5 * size / 2**30).load(QUANT, PRECISION)
    assert entries(tmp_path) == [new] and "more than model.quantized_cache_gib" in caplog.text


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    base(tmp_path / "file" / "cache").load(QUANT, PRECISION)
    assert "the quantized base is not stored" in caplog.text


@pytest.mark.parametrize(
    ("folder", "gib", "said"), [(5, 1, "quantized_cache=5"), ("x", "much", "quantized_cache_gib=much")]
)
def test_wrong_values_are_named(folder, gib, said):
    node = {"pretrained_model_name_or_path": "data/tiny_llama3", "quantized_cache": folder, "quantized_cache_gib": gib}
    with pytest.raises(UserError, match=said):
        Base(OmegaConf.create(node))


def test_a_run_does_not_say_where_its_base_is_kept(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy)
    cfg = OmegaConf.load(copy / "config.yaml")
    cfg.model.quantized_cache = str(tmp_path / "elsewhere")
    OmegaConf.save(cfg, copy / "config.yaml")
    Intern(Run(copy), {"max_new_tokens": 4})
    assert not (tmp_path / "elsewhere").exists()
    assert len(entries(tmp_path / "home" / ".cache" / "intern" / "quantized")) == 1
