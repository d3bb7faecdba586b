"""The memory plan is measured, applied, stored and undone: on a simulated GPU, and on a real one."""

import types

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from helpers import adapters, tiny_trainer
from torch.utils.data import BatchSampler, DataLoader
from transformers import LlamaConfig, LlamaModel, TrainerState

import intern.memory.apply
import intern.memory.measure
from intern.errors import RunError
from intern.kernels import cudnn_attention, cudnn_graphs, isolated_attention
from intern.kernels.decoder_layers import decoder_layers
from intern.kernels.install import InstalledKernels
from intern.memory.batches import largest
from intern.memory.callback import FitMemory
from intern.memory.plan import MemoryPlan
from intern.memory.stored_plan import read_plan
from intern.runs.directory import Run
from intern.units import GIB


def arguments(form=None, **given):
    usual = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    return types.SimpleNamespace(activation_checkpointing_kwargs=form, **usual | given)


def trainer(model, args, rows=None, **given):
    accelerator = types.SimpleNamespace(num_processes=1)
    kept = {"model": model, "args": args, "train_dataset": rows, "accelerator": accelerator, "padding_free": True}
    kept["kernels"] = InstalledKernels()
    kept["data_collator"] = lambda batch: {"input_ids": torch.ones(1, sum(len(row["input_ids"]) for row in batch))}
    return types.SimpleNamespace(**kept | given)


def begin(fit, loader=None, **state):
    """Training begins; by default with a loader whose order of batches is not known yet."""
    trainer = fit.trainer
    loader = loader or DataLoader(trainer.train_dataset or range(3), batch_size=1, shuffle=True)
    fit.on_train_begin(trainer.args, TrainerState(stateful_callbacks=[], **state), None, train_dataloader=loader)


class SimulatedProbe:
    """A probe of a simulated GPU: a batch takes `alone` seconds without CUDA graphs and `replayed` seconds with them."""

    budget = 14 * GIB
    is_recorded = False

    def __init__(self, fit, alone=0.09, replayed=0.03, loss=2.0, peak=12 * GIB, held=13 * GIB, error=None):
        self.fit, self.seconds, self.loss, self.error = fit, {False: alone, True: replayed}, loss, error
        self.peak, self.reserved = (lambda batch: peak), (lambda batch: held)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        pass

    def timed(self, rows):
        replayed = self.fit.plan.replayed
        if replayed and self.error is not None:
            raise self.error
        if replayed and not self.is_recorded:
            self.is_recorded = True
            return 0.2, self.loss
        return self.seconds[replayed], self.loss if replayed else 2.0


@pytest.mark.parametrize(
    ("gpu", "steps", "replayed"),
    [
        ({}, 100, True),
        ({}, 8, None),  # over before the recording could pay off
        ({"alone": 0.11}, 100, None),  # so long for four layers that the GPU is the bottleneck
        ({}, 9, False),  # over before the recording has paid off
        ({"replayed": 0.091}, 100, False),  # not faster
        ({"loss": 2.1}, 100, False),  # not what the layers compute without graphs
        ({"held": int(13.9 * GIB)}, 100, False),  # not enough memory
        ({"error": torch.OutOfMemoryError("full")}, 100, False),
        ({"error": RuntimeError("operation not permitted when stream is capturing")}, 100, False),
        ({"peak": 11 * GIB}, 100, True),  # with weights dequantized into the free memory
        ({"dropout": 0.1}, 100, None),  # a replay would repeat the recorded draw
    ],
)
def test_cuda_graphs_are_used_if_they_pay_fit_and_agree(gpu, steps, replayed, tmp_path, monkeypatch):
    gpu = {"dropout": 0.0} | gpu
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=8, num_attention_heads=2, vocab_size=10, attention_dropout=gpu.pop("dropout")
    )
    model = LlamaModel(config)
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (5, 9, 7)]})
    fit = FitMemory(trainer(model, arguments(gradient_accumulation_steps=2), rows), Run(tmp_path))
    made = []

    class Graphs:
        def __init__(self, layers, most_tokens, longest_row):
            made.append((len(layers), most_tokens, longest_row))

        def undo(self):
            made.append("removed")

    monkeypatch.setattr(intern.memory.measure, "Probe", lambda trainer: SimulatedProbe(fit, **gpu))
    monkeypatch.setattr(intern.memory.apply, "LayerGraphs", Graphs)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    begin(fit, max_steps=steps)
    assert fit.plan.replayed == bool(replayed) and fit.plan.tokens == 9
    assert made == {True: [(4, 9, 9)], False: [(4, 9, 9), "removed"], None: []}[replayed]  # None: not tried
    assert read_plan(fit.run, layers=4) == fit.plan
    assert ("CUDA graphs" in str(fit.plan)) == bool(replayed)
    if replayed:
        fit.step_back()  # memory runs out: the graphs are given up first
        assert not fit.plan.replayed and made[-1] == "removed"


@pytest.mark.parametrize("case", ["frozen", "trained", "reentrant"])
def test_layers_recompute_in_our_own_form_and_frozen_embeddings_need_no_gradient(case, tmp_path, monkeypatch):
    model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10)).train()
    model.gradient_checkpointing_enable()
    theirs = model.layers[0]._gradient_checkpointing_func
    model.embed_tokens.requires_grad_(case == "trained")
    if case != "trained":
        model.enable_input_require_grads()  # as TRL does, and the trainer once more
        model.enable_input_require_grads()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].requires_grad))
    fit = FitMemory(trainer(model, arguments({"use_reentrant": True} if case == "reentrant" else {})), Run(tmp_path))
    fit.run.write_json(fit.run.memory, {"layers": 2, "checkpointed": 1, "peak": 5, "budget": 6})
    ids = torch.arange(6)[None]
    model(input_ids=ids)
    begin(fit, global_step=5)
    assert (model.layers[0]._gradient_checkpointing_func is theirs) == (case == "reentrant")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for layer in model.layers:
        layer.gradient_checkpointing = False
    model(input_ids=ids)
    fit.on_train_end(None, None, None)
    model(input_ids=ids)
    assert seen == [True, case != "frozen", True]


def test_layers_with_a_loss_of_their_routers_keep_the_librarys_form_of_checkpointing(tmp_path):
    model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10))
    model.gradient_checkpointing_enable()
    theirs = model.layers[0]._gradient_checkpointing_func
    fit = FitMemory(
        trainer(model, arguments(), Dataset.from_dict({"input_ids": [[1] * 5]}), aux_loss_enabled=True),
        Run(tmp_path),
        every_layer=True,
    )
    begin(fit)
    assert not fit.plan.offloaded and fit.plan.checkpointed == 2
    assert model.layers[0]._gradient_checkpointing_func is theirs
    with pytest.raises(RunError):
        fit.step_back()


@pytest.mark.parametrize(
    ("free", "is_long", "has_frontend", "once"),
    [
        (
            2 * 2 * 4 * 2**20,
            True,
            True,
            True,
        ),  # half of it holds two tensors for each of four layers, 700,000 bytes rounded up to 2**20
        (2 * 2 * 4 * 2**20 - 1, True, True, False),
        (GIB, False, True, False),  # attention over short rows is quickly computed again
        (GIB, True, False, False),  # results of other kernels are not stored
    ],
)
def test_results_of_attention_are_stored_if_the_host_has_room(free, is_long, has_frontend, once, tmp_path, monkeypatch):
    model = LlamaModel(LlamaConfig(num_hidden_layers=4, hidden_size=100, num_attention_heads=2, vocab_size=10))
    rows = Dataset.from_dict(
        {"input_ids": [[1] * 5, [1] * 3500], "seq_lengths": [[5], [3500] if is_long else [1000, 2500]]}
    )
    fit = FitMemory(trainer(model, arguments(), rows), Run(tmp_path), every_layer=True)
    monkeypatch.setattr(intern.memory.measure, "available_memory", lambda: free)
    monkeypatch.setattr(cudnn_graphs, "has_cudnn_frontend", lambda: has_frontend)
    monkeypatch.setattr(isolated_attention, "_uses_cudnn", False)  # restored afterwards
    begin(fit, max_steps=10**10)
    assert fit.plan == MemoryPlan(4, 4, 0, 0, offloaded=True, attends_once=once, cudnn=has_frontend)
    assert isolated_attention._uses_cudnn == has_frontend
    text = "their inputs and attention in host memory" if once else "their inputs in host memory"
    assert text in str(fit.plan)
    form = model.layers[0]._gradient_checkpointing_func
    assert form.args[1] == once


def test_the_largest_batch_is_a_coming_one_and_not_the_longest_rows_together():
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (2, 9, 3, 8, 5)]})

    def lengths(*given):
        return [len(row["input_ids"]) for row in largest(rows, 2, *given)]

    assert lengths() == [9, 8]
    coming = [[0, 1], [2, 3], [4, 3]]
    assert lengths(iter(coming)) == [8, 5]
    assert lengths(coming, True) == [9, 2]  # 2 x 9 tokens with padding


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_plan_is_for_the_largest_coming_batch(padding_free, tmp_path):
    lengths = [2, 9, 3, 8, 5, 6, 7, 4]
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10))
    args = arguments(per_device_train_batch_size=2)
    fit = FitMemory(trainer(model, args, rows, padding_free=padding_free), Run(tmp_path), every_layer=True)
    loader = DataLoader(rows, batch_sampler=BatchSampler(SeedableRandomSampler(rows, data_seed=3), 2, False))
    begin(fit, loader, max_steps=1)
    sizes = [[lengths[index] for index in batch] for batch in loader.batch_sampler]
    largest = max(sizes, key=sum if padding_free else max)
    assert [len(row["input_ids"]) for row in fit._batches.largest] == sorted(largest, reverse=True) != [9, 8]


@pytest.mark.parametrize("form", [{}, {"offloaded": True}, {"offloaded": True, "tiled": True}])
def test_a_layer_with_dropout_draws_the_same_again_when_it_recomputes(form, tmp_path, monkeypatch):
    """Otherwise gradients belong to another network than the loss, and nothing says so."""
    monkeypatch.setattr(intern.memory.apply, "TILE_TOKENS", 8)

    def trained(checkpointed):
        monkeypatch.setattr(FitMemory, "_measured", lambda fit, chooser: MemoryPlan(4, checkpointed, 0, 0, **form))
        targets = ("q_proj", "v_proj", "gate_proj", "down_proj")
        # SGD: what a wrong gradient changes shows at its full size.
        callbacks = [lambda trainer: FitMemory(trainer, Run(tmp_path))]
        model = tiny_trainer(tmp_path, True, 0.5, targets, callbacks, optim="sgd", learning_rate=1.0)
        passes = []
        decoder_layers(model.model)[0].mlp.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        model.train()
        assert (
            passes == ([False, True] if checkpointed else [True]) * 3
        )  # each of three steps computes it again, or not
        return adapters(model)

    found = trained(checkpointed=4)
    for name, expected in trained(checkpointed=0).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


def test_cudnns_attention_ends_with_training(tmp_path, monkeypatch):
    model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10))
    fit = FitMemory(
        trainer(model, arguments(), Dataset.from_dict({"input_ids": [[1] * 5]})), Run(tmp_path), every_layer=True
    )
    monkeypatch.setattr(cudnn_graphs, "has_cudnn_frontend", lambda: True)
    monkeypatch.setattr(isolated_attention, "_uses_cudnn", False)  # restored afterwards
    begin(fit, max_steps=10**10)
    assert isolated_attention._uses_cudnn
    cudnn_attention._offsets(
        torch.tensor([0, 3, 5]), cudnn_graphs.AttentionSizes(8, 5, 4, 1, 1, 8, None, 1.0, False, 0)
    )
    fit.on_train_end(None, None, None)
    assert not isolated_attention._uses_cudnn and fit.plan.cudnn
    assert not cudnn_attention._last_offsets  # they are in GPU memory


def test_a_plan_that_was_not_measured_is_repeated_too(tmp_path, monkeypatch):
    """cuDNN's attention pays in a long run; it must not change because few steps are left after a resume."""
    monkeypatch.setattr(cudnn_graphs, "has_cudnn_frontend", lambda: True)
    monkeypatch.setattr(isolated_attention, "_uses_cudnn", False)  # restored afterwards

    def plan(**state):
        model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10))
        fit = FitMemory(
            trainer(model, arguments(), Dataset.from_dict({"input_ids": [[1] * 5]})), Run(tmp_path), every_layer=True
        )
        begin(fit, **state)
        return fit.plan

    first = plan(max_steps=10**10)
    assert first.cudnn and plan(max_steps=10**10, global_step=10**10 - 1) == first


def test_a_run_whose_memory_plan_cannot_be_used_resumes_with_a_new_one(tmp_path, caplog):
    model = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10))
    fit = FitMemory(
        trainer(model, arguments(), Dataset.from_dict({"input_ids": [[1] * 5]})), Run(tmp_path), every_layer=True
    )
    fit.run.write_json(fit.run.memory, {"layers": 2, "checkpointed": 1, "peak": 5, "budget": 6, "of_tomorrow": True})
    begin(fit, global_step=5, max_steps=6)
    assert fit.plan.checkpointed == 2 and read_plan(fit.run, layers=2) == fit.plan
    assert "of_tomorrow" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: a CPU's memory has no such limit")
def test_the_plan_is_measured_and_stored(tmp_path):
    from helpers import train

    run = train(
        tmp_path / "run",
        "trainer.use_cpu=false",
        "trainer.fp16=true",
        "trainer.activation_checkpointing=auto",
        "quant.bnb_4bit_compute_dtype=float16",
    )
    assert run.read_json(run.metrics)["checkpointed_layers"] == 0
