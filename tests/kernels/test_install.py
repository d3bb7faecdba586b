"""The list of kernels: what fits is installed for the time of training, in order, and nothing of it is left afterwards."""

import types

import pytest
import torch
from helpers import callback_of, tiny_trainer
from transformers import TrainerCallback

from intern.kernels import install, isolated_attention
from intern.kernels.decoder_layers import decoder_layers
from intern.kernels.install import InstalledKernels, Kernel
from intern.kernels.patches import Patches
from intern.memory.callback import FitMemory
from intern.memory.plan import MemoryPlan
from intern.runs.directory import Run


def replaced(model):
    """What kernels and memory plans set on modules."""
    names = ("forward", "siblings", "_gradient_checkpointing_func", "gradient_checkpointing")
    return {
        (place, name): getattr(vars(module)[name], "func", vars(module)[name])
        for place, module in model.named_modules()
        for name in names
        if name in vars(module)
    }


class Look(TrainerCallback):
    """What is installed after the first step; after the second one training may fail."""

    def __init__(self, trainer, fails=False):
        self.trainer = trainer
        self.fails = fails

    def on_step_end(self, args, state, control, **kwargs):
        self.kernels = set(self.trainer.kernels._installed)
        self.replaced = replaced(self.trainer.model)
        self.uses_cudnn = isolated_attention._uses_cudnn
        if self.fails and state.global_step == 2:
            raise RuntimeError("the step failed")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("form", ["tiled", "unpacked"])
def test_nothing_is_left_of_kernels_and_memory_plan_when_training_ends_or_fails(form, fails, tmp_path, monkeypatch):
    plans = {
        "tiled": MemoryPlan(4, 4, 0, 0, offloaded=True, tiled=True, cudnn=True),
        "unpacked": MemoryPlan(4, 0, 0, 0, unpacked=10**9, cudnn=True),
    }
    monkeypatch.setattr(FitMemory, "_measured", lambda fit, chooser: plans[form])
    callbacks = [lambda trainer: FitMemory(trainer, Run(tmp_path)), lambda trainer: Look(trainer, fails)]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks)
    fit, look = callback_of(trainer, FitMemory), callback_of(trainer, Look)
    trainer.model.activation_checkpointing_enable()  # as the library does when training begins
    before = replaced(trainer.model)
    weights = []
    if fails:
        with pytest.raises(RuntimeError, match="the step failed"):
            trainer.train()
    else:
        look.on_train_end = lambda *_, **__: weights.extend(
            weight.unpacked
            for weight in trainer.model.base_model.model.model.layers[0].self_attn.k_proj.siblings.weights
        )
        trainer.train()
        assert weights == [None] * 3  # what it held is free before anything is scored
    assert look.kernels == {"lora_linear", "last_mlp", "lm_head", "rms_norm"} and look.uses_cudnn
    assert len(look.replaced) > len(before) + 20
    assert replaced(trainer.model) == before
    assert not isolated_attention._uses_cudnn
    assert fit.plan.checkpointed == plans[form].checkpointed  # metrics.json has it


def test_the_last_mlp_computes_scored_positions_only_although_liger_replaces_mlps_when_training_begins(
    tmp_path, monkeypatch
):
    rows = []

    def put(model, config):
        for layer in model.base_model.model.model.layers:
            forward = type(layer.mlp).forward

            def counted(mlp, hidden, forward=forward):
                rows.append(hidden.shape[:-1].numel())
                return forward(mlp, hidden)

            layer.mlp.forward = types.MethodType(counted, layer.mlp)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", put)
    tiny_trainer(tmp_path, use_liger_kernel=True, activation_checkpointing=False).train()
    assert rows == [30, 30, 30, 10] * 3  # four layers; the last one where the next token carries loss


@pytest.mark.parametrize("case", ["not quantized", "a head that is trained", "a loss of routers"])
def test_a_kernel_that_does_not_fit_steps_aside(case, tmp_path):
    trainer = tiny_trainer(tmp_path, quantized=case != "not quantized")
    if case == "a head that is trained":
        trainer.model.get_output_embeddings().requires_grad_(True)
    kernels, every = InstalledKernels(), {"lora_linear", "last_mlp", "lm_head", "rms_norm"}
    aside = {
        "not quantized": {"lora_linear"},
        "a head that is trained": {"lm_head"},
        "a loss of routers": {"last_mlp", "lm_head"},
    }
    with kernels.installed(trainer.model, has_router_loss=case == "a loss of routers"):
        assert {name for name in every if name in kernels} == every - aside[case]
    assert not any(name in kernels for name in every)


class Doubled:
    """A kernel as someone would add it: its module, and one entry of the list."""

    @staticmethod
    def applies(model):
        return bool(decoder_layers(model))

    @staticmethod
    def install(model):
        patches, mlp = Patches(), decoder_layers(model)[0].mlp
        before = mlp.forward
        patches.set(mlp, "forward", lambda hidden: 2 * before(hidden))
        return patches


def test_a_kernel_is_added_with_one_entry_and_undone_in_reverse_order(tmp_path, monkeypatch):
    model = tiny_trainer(tmp_path).model
    mlp, order = decoder_layers(model)[0].mlp, []
    hidden = torch.ones(1, 3, mlp.gate_proj.in_features)
    plain = mlp(hidden)
    monkeypatch.setattr(install, "KERNELS", (*install.KERNELS, Kernel("doubled", Doubled.applies, Doubled.install)))
    kernels = InstalledKernels()
    with kernels.installed(model):
        kernels.on_uninstall(lambda: order.append("doubled" in kernels and torch.allclose(mlp(hidden), 2 * plain)))
        assert torch.allclose(mlp(hidden), 2 * plain)
    assert order == [True]  # what wraps the kernels goes first
    assert torch.equal(mlp(hidden), plain)


def test_patches_restore_what_an_instance_had_before():
    module = torch.nn.Identity()
    module.forward = first = lambda x: x + 1
    patches = Patches()
    patches.set(module, "forward", lambda x: x + 2)
    patches.set(module, "forward", lambda x: x + 3)
    patches.set(module, "note", 5)
    assert module(1) == 4 and len(patches) == 3
    patches.undo()
    patches.undo()
    assert module.forward is first and not hasattr(module, "note") and len(patches) == 0
