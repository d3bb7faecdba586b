"""What the GPU can compute in. GPUs are replaced by what torch reports of them."""

import pytest
import torch

from intern.errors import UserError
from intern.model.precision import plan_inference, plan_training


@pytest.fixture
def card(monkeypatch):
    def put(bf16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100" if bf16 else "Tesla T4")
        # A T4 reports bfloat16 if emulation counts.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )

    return put


def test_a_t4_computes_in_fp16_by_default(card):
    card(bf16=False)
    plan = plan_training(False, None, None, torch.float16)
    assert (plan.fp16, plan.bf16, plan.dtype) == (True, False, torch.float16)
    assert str(plan) == "Tesla T4: fp16 with loss scaling precision, computing in float16, adapters in float32"


def test_a_newer_gpu_computes_in_bf16_by_default(card):
    card(bf16=True)
    plan = plan_training(False, None, None, torch.bfloat16)
    assert (plan.fp16, plan.bf16, plan.dtype) == (False, True, torch.bfloat16)


def test_fp16_can_be_chosen_on_a_newer_card(card):
    card(bf16=True)
    assert plan_training(False, True, False, torch.float16).fp16


def test_full_precision_can_be_chosen(card):
    card(bf16=True)
    plan = plan_training(False, False, False, None)
    assert (plan.fp16, plan.bf16, plan.dtype) == (False, False, torch.float32)


def test_bf16_on_a_t4_is_refused_with_the_remedy(card):
    card(bf16=False)
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16: use trainer=t4_min100 quant=nf4_fp16"):
        plan_training(False, False, True, torch.bfloat16)


@pytest.mark.parametrize(
    ("fp16", "bf16", "compute", "remedy"),
    [
        (True, False, torch.bfloat16, "quant=nf4_fp16"),
        (False, True, torch.float16, "quant=nf4_bf16"),
        (True, True, None, "set one of them"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(card, fp16, bf16, compute, remedy):
    card(bf16=True)
    with pytest.raises(UserError, match=remedy):
        plan_training(False, fp16, bf16, compute)


def test_a_missing_gpu_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU found.*experiment=tiny_cpu"):
        plan_training(False, True, False, torch.float16)
    with pytest.raises(UserError, match="needs a GPU"):
        plan_training(True, True, False, torch.float16)


def test_a_cpu_computes_in_the_dtype_of_the_quantization():
    assert plan_training(True, False, False, torch.float32).dtype == torch.float32
    assert plan_training(True, False, True, torch.float32).dtype == torch.bfloat16


def test_answers_are_computed_as_in_training_if_the_gpu_can(card, monkeypatch):
    card(bf16=True)
    assert plan_inference(torch.float16).dtype == torch.float16
    assert plan_inference(None).dtype == torch.bfloat16
    card(bf16=False)
    assert plan_inference(torch.bfloat16).dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan_inference(torch.float16).dtype == torch.float32
