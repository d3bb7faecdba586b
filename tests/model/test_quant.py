"""A quantization is one object: it is chosen by conf/quant, tests itself, and can be added from outside."""

import bitsandbytes as bnb
import pytest
import torch
from helpers import ROOT, train
from omegaconf import OmegaConf
from transformers import BitsAndBytesConfig

import intern.model.quant
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import EightBit, FourBit, build_quant
from intern.model.sizes import weight_bytes


class PlainFourBit(FourBit):
    """FP4 with a key of its own and without double quantization."""

    key = "load_in_fp4"

    class config_class:
        def __new__(cls, load_in_fp4: bool, skip: list[str] | None = None) -> BitsAndBytesConfig:
            return BitsAndBytesConfig(
                load_in_4bit=load_in_fp4, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=skip or ["lm_head"]
            )

        def __init__(self, load_in_fp4: bool, skip: list[str] | None = None) -> None: ...


def quant(**values):
    return build_quant(OmegaConf.create(values))


def test_the_configuration_chooses_the_quantization():
    assert quant() is None and quant(bnb_4bit_compute_dtype="float32") is None
    assert isinstance(quant(load_in_4bit=True), FourBit) and isinstance(quant(load_in_8bit=True), EightBit)
    with pytest.raises(UserError, match="quant"):
        quant(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(UserError, match=r"quant.load_in_5bit: unknown key"):
        quant(load_in_5bit=True)


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 0.05),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 0.06),
        ({"load_in_8bit": True}, 0.003),
    ],
)
def test_each_quantization_tests_itself(values, largest):
    assert 0 < quant(**values).self_test("cpu") < largest


def test_the_self_test_notices_kernels_that_compute_wrongly(monkeypatch):
    restore = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *arguments: -restore(*arguments))
    assert quant(load_in_4bit=True, bnb_4bit_quant_type="nf4").self_test("cpu") > 0.1


def test_a_quantization_can_be_added_from_outside(monkeypatch):
    monkeypatch.setattr(intern.model.quant, "QUANTIZATIONS", [*intern.model.quant.QUANTIZATIONS, PlainFourBit])
    added = quant(load_in_fp4=True, skip=["lm_head", "k_proj"])
    assert isinstance(added, PlainFourBit) and added.name == "fp4" and added.self_test("cpu") < 0.06
    base = Base(OmegaConf.create({"pretrained_model_name_or_path": str(ROOT / "data/tiny_llama3")}))
    model = base.load(added, Precision("cpu", torch.float32, False, False))
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in model.named_modules() if "proj" in name}
    assert kinds.pop("k_proj") is torch.nn.Linear and set(kinds.values()) == {bnb.nn.Linear4bit}
    assert weight_bytes(base, added, torch.float32) < 0.8 * weight_bytes(base, None, torch.float32)
    with pytest.raises(UserError, match="quant.skipped: unknown key"):
        quant(load_in_fp4=True, skipped=["k_proj"])


def test_an_int8_base_is_trained_and_queried(tmp_path, caplog):
    run = train(tmp_path, "quant=int8", "trainer.max_steps=4", "trainer.min_steps=4", "data.eval_file=null")
    losses = [entry["loss"] for entry in run.read_history() if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert "MatMul8bitLt" not in caplog.text
    intern = Intern(run, {"max_new_tokens": 4, "do_sample": False})
    layers = [module for module in intern.model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert len(layers) == 7 * 4 and {layer.weight.dtype for layer in layers} == {torch.int8}
    assert isinstance(intern.answer("How much?"), str)
