"""The trainer: float32 adapters, metrics without waiting, steps that are repeated after memory ran out."""

import contextlib
import gc
import types
import weakref

import bitsandbytes as bnb
import pytest
import torch
import trl.trainer.utils
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from helpers import tiny_trainer
from omegaconf import OmegaConf
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback, masking_utils
from trl import SFTConfig, SFTTrainer

import intern.memory.apply
from intern.errors import RunError
from intern.kernels.rms_norm import gradient
from intern.memory.apply import PlanApplier
from intern.memory.batches import coming_batches
from intern.memory.callback import FitMemory
from intern.memory.plan import MemoryPlan
from intern.memory.probe import Probe
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import FourBit
from intern.runs.directory import Run
from intern.training.arguments import StepRules
from intern.training.trainer import InternTrainer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: fp16 loss scaling runs nowhere else")
def test_fp16_training_keeps_its_adapters_in_float32_and_counts_its_steps(tmp_path):
    from helpers import train

    run = train(tmp_path / "run", "trainer.use_cpu=false", "trainer.fp16=true", "quant.bnb_4bit_compute_dtype=float16")
    assert run.read_json(run.metrics)["optimizer_steps"] == 12
    assert run.read_history()[-1]["loss_scale"] > 1


def test_packed_rows_train_without_reading_a_mask_or_labels(tmp_path, monkeypatch):
    """Reading them would wait for the GPU in every step."""
    from helpers import train

    def look(position_ids):
        raise AssertionError("a look at the position of every token")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)  # TRL's head, which looks for labels
    run = train(tmp_path / "run", "trainer.packing=true", "trainer.eval_strategy=steps", "trainer.eval_steps=4")
    assert run.read_json(run.metrics)["optimizer_steps"] == 12


class Made:
    """A callback that is made for a trainer, and can be read afterwards."""

    def __init__(self, kind, *arguments):
        self.kind, self.arguments = kind, arguments

    def __call__(self, trainer):
        self.callback = self.kind(trainer, *self.arguments)
        return self.callback


def trained_adapters(tmp_path, faults, callback=None, at="mlp", rows_of_batch=1, makes_room=True, **more):
    """The adapters after three steps of two batches, and the passes after which memory was freed.

    `faults` are the passes in which memory runs out, `callback` makes a callback for the trainer.
    """
    base = Base(
        OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3", "attn_implementation": "isolated"})
    )
    quant = FourBit(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    model = base.load(quant, Precision("cpu", torch.float32, False, False))
    ids = [list(range(100 + row, 130 + row)) for row in range(6)]
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=rows_of_batch,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        seed=1,
        include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )
    trainer = InternTrainer(
        StepRules(3, 5),
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=base.tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    )
    passes, room = [], []

    def full(*_):
        passes.append(1)
        if len(passes) in faults:
            raise torch.OutOfMemoryError("CUDA out of memory")

    layer = trainer.model.get_base_model().model.layers[3]
    layer.get_submodule(at).register_forward_pre_hook(full)

    class Room(TrainerCallback):
        can_step_back = True

        def before_batch(self, tokens):
            pass

        def step_back(self):
            assert not layer.self_attn.k_proj.siblings._waiting  # the failed pass holds nothing
            room.append(len(passes))

    if callback is not None:
        trainer.add_callback(callback(trainer))
    if makes_room:
        trainer.add_callback(Room())
    trainer.train()
    rows_of_step = min(2 * rows_of_batch, len(ids))
    # Read only at the end: no log entry comes before.
    assert trainer.state.num_input_tokens_seen == 3 * rows_of_step * 30
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, room


def test_norms_stay_fused_although_liger_replaces_norms_at_the_beginning_of_training(tmp_path, monkeypatch):
    def put(model, config):
        for layer in model.base_model.model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = types.MethodType(type(norm).forward, norm)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", put)
    seen = []
    monkeypatch.setattr(
        "intern.kernels.rms_norm.gradient", lambda *given: seen.append(given[1] is not None) or gradient(*given)
    )
    trained_adapters(tmp_path, faults=[], use_liger_kernel=True)
    assert any(seen)


@pytest.mark.parametrize("fails", [False, True])
def test_an_optimizer_keeps_no_embeddings_and_no_paged_state_after_training(tmp_path, monkeypatch, fails):
    """The libraries store them in lists of the whole process: a sweep would hold those of every job."""
    noted, register = [], bnb.optim.GlobalOptimManager.register_module_override

    def note(manager, module, *more):
        noted.append(weakref.ref(module))
        register(manager, module, *more)

    def step(optimizer, closure=None):
        state = torch.zeros(3)
        optimizer.page_mng.paged_tensors.append(state)
        noted.append(weakref.ref(state))
        if fails:
            raise RunError("no step")

    monkeypatch.setattr(bnb.optim.GlobalOptimManager, "register_module_override", note)
    monkeypatch.setattr(bnb.optim.AdamW, "step", step)  # its kernels need a GPU
    with contextlib.suppress(RunError):
        trained_adapters(tmp_path, faults=[], optim="adamw_bnb_8bit")
    gc.collect()
    assert len(noted) == (2 if fails else 4)  # the embeddings, and a state for each step
    assert not any(one() is not None for one in noted)


class Logs(TrainerCallback):
    """What is logged, but for times."""

    def __init__(self, trainer):
        self.entries = []

    def on_log(self, *_, logs, **given):
        kept = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_input_tokens_seen")
        self.entries.append({name: logs[name] for name in kept if name in logs})


@pytest.mark.parametrize("steps", [1, 3])
def test_loss_and_metrics_are_trls(steps, tmp_path, monkeypatch):
    ours, theirs = Made(Logs), Made(Logs)
    found, _ = trained_adapters(tmp_path, (), ours, logging_steps=steps)
    monkeypatch.setattr(InternTrainer, "_plain_loss", SFTTrainer.compute_loss)
    expected, _ = trained_adapters(tmp_path, (), theirs, logging_steps=steps)
    entries = ours.callback.entries
    assert len(entries) == 3 // steps + 1 and entries[0].keys() >= {"loss", "entropy", "mean_token_accuracy"}
    for mine, other in zip(entries, theirs.callback.entries, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("at", ["mlp", "self_attn.k_proj"])  # the latter between layers that share a node
def test_a_step_in_which_memory_runs_out_is_repeated_and_leaves_no_trace(at, tmp_path):
    expected, nothing = trained_adapters(tmp_path, (), at=at)
    # The second batch of the second step, and the first of its repetition.
    found, room = trained_adapters(tmp_path, (4, 5), at=at)
    assert nothing == [] and room == [4, 5]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Foretelling(TrainerCallback):
    """The rows of each batch, as they are known before training and as they come."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        self.known = list(coming_batches(train_dataloader, 3 * 2))
        self.came = []
        collate = self.trainer.data_collator.collate
        self.trainer.data_collator.collate = lambda rows: (
            self.came.append([row["input_ids"][0] - 100 for row in rows]) or collate(rows)
        )


def test_batches_are_known_before_they_come(tmp_path):
    expected, _ = trained_adapters(tmp_path, (), rows_of_batch=4)
    made = Made(Foretelling)
    found, _ = trained_adapters(tmp_path, (), made, rows_of_batch=4)
    foretelling = made.callback
    assert foretelling.came == foretelling.known
    assert len({tuple(batch) for batch in foretelling.known}) == 6  # three epochs, in an order of their own each
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # looking ahead changes nothing
    assert list(coming_batches(DataLoader(range(4), batch_size=2, shuffle=True), 6)) == []  # drawn only when read


@pytest.mark.parametrize("pinned", [True, False])
def test_the_next_batch_is_copied_while_the_gpu_computes_if_its_memory_is_pinned(pinned, tmp_path, monkeypatch):
    seen, prepare, check = [], DataLoaderShard.__init__, SFTConfig.__post_init__

    def checked(args):
        check(args)
        args.dataloader_pin_memory = pinned  # with use_cpu the library would set False

    def prepared(loader, *given, **more):
        seen.append(more.get("_non_blocking"))
        prepare(loader, *given, **more)

    monkeypatch.setattr(DataLoaderShard, "__init__", prepared)
    monkeypatch.setattr(SFTConfig, "__post_init__", checked)
    tiny_trainer(tmp_path).train()
    assert seen and set(seen) == {pinned}


class Probing(TrainerCallback):
    """Steps for the memory plan, before training and once more when the optimizer has states."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.moved = []

    def on_train_begin(self, args, state, control, **kwargs):
        probe = Probe(self.trainer)
        with probe:
            probe._step(list(self.trainer.train_dataset.select([5])))
            pairs = zip(probe.trained, probe._weights, strict=True)
            self.moved.append(any(not torch.equal(trained.data, before) for trained, before in pairs))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.on_train_begin(args, state, control)


def test_a_step_that_was_only_tried_leaves_no_trace(tmp_path, monkeypatch):
    expected, _ = trained_adapters(tmp_path, ())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    probing = Made(Probing)
    found, _ = trained_adapters(tmp_path, (), probing)
    assert probing.callback.moved == [True, True]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "form", [{"checkpointed": 2}, {}, {"offloaded": True}, {"offloaded": True, "attends_once": True, "tiled": True}]
)
def test_every_form_of_the_memory_plan_trains_the_same_adapters(form, tmp_path, monkeypatch):
    plan = MemoryPlan(**{"layers": 4, "checkpointed": 4, "peak": 0, "budget": 0} | form)
    fit = Made(FitMemory, Run(tmp_path))
    monkeypatch.setattr(FitMemory, "_measured", lambda fit, chooser: plan)
    monkeypatch.setattr(intern.memory.apply, "TILE_TOKENS", 8)  # tokens: rows of 30 go in four pieces
    expected, _ = trained_adapters(tmp_path, ())
    found, _ = trained_adapters(tmp_path, (), fit)
    assert fit.callback.plan == plan
    # AdamW divides each gradient by its own size, so for a gradient near zero the order of a sum shows in the adapter, more on
    # some processors than on others (1.2e-6 measured). 2e-6 is a tenth of one step at this learning rate of 2e-5.
    close = 2e-6 if plan.tiled else 1e-6
    for name, adapter in expected.items():
        torch.testing.assert_close(found[name], adapter, atol=close, rtol=1e-4)


def test_as_many_layers_recompute_as_a_batch_requires(tmp_path, monkeypatch):
    fit = Made(FitMemory, Run(tmp_path))
    monkeypatch.setattr(FitMemory, "_measured", lambda fit, chooser: MemoryPlan(4, 3, 0, 0, tokens=120))
    seen, select = [], PlanApplier.select_checkpointed_layers

    def selected(applier, tokens):
        select(applier, tokens)
        seen.append((tokens, sum(layer.gradient_checkpointing for layer in applier.layers)))

    monkeypatch.setattr(PlanApplier, "select_checkpointed_layers", selected)
    expected, _ = trained_adapters(tmp_path, (), rows_of_batch=4)
    found, _ = trained_adapters(tmp_path, (), fit, rows_of_batch=4)
    assert seen == [(120, 3)] + 3 * [(120, 3), (60, 2)]  # when the plan is taken, and each batch of three epochs
    for name, adapter in expected.items():
        torch.testing.assert_close(found[name], adapter, atol=1e-6, rtol=1e-4)


def test_without_a_memory_plan_a_run_ends_when_memory_runs_out(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trained_adapters(tmp_path, (2,), makes_room=False)


def test_no_step_counts_floating_point_operations(tmp_path, monkeypatch):
    """The library would count all parameters again for every batch, and nothing uses the number."""

    def count(*arguments, **more):
        raise AssertionError("parameters are counted")

    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "num_parameters", count)
    trainer.train()
    assert trainer.state.global_step == 3


def test_log_entries_have_no_second_count_of_tokens(tmp_path, monkeypatch):
    """TRL's starts at 0 after a resume, so two log entries of the same step would differ."""
    monkeypatch.setattr(InternTrainer, "_plain_loss", SFTTrainer.compute_loss)  # which counts
    trainer = tiny_trainer(tmp_path, logging_steps=1)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and not any("num_tokens" in entry for entry in losses)
