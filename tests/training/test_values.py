"""Whatever is written into a key: the plan is made, or one line says what is wrong. What training accepts can be asked."""

import dataclasses
import random

import pytest
from helpers import ROOT, composed
from omegaconf import open_dict

from intern.errors import UserError
from intern.inference.generation_values import check_generation
from intern.runs.directory import Run
from intern.training.plan import PlanPieces

TINY = ("experiment=tiny_cpu", "logger=none", "data.context=never", "trainer.max_steps=4", "trainer.min_steps=2")
ODD = [
    None, True, False, 0, 1, -1, 3, 7, 10**6, 10**20, 0.0, 0.5, -0.5, 1e-40, 1e300, float("nan"), float("inf"), "", "no", "7", "nope",
    "auto", "${nope}", "null", "steps", "é", "a\nb", "\udcff", "*", "(", [], [1], ["nope"], [None], [[]], [["a"]], {}, {"nope": 1}, {"q_proj": 0},
    {"nope": {"x": []}},
]  # fmt: skip
GROUPS = ("model", "quant", "lora", "trainer", "data")
# Keys of the libraries that no group file has, which people add with a plus.
ADDED = {
    "lora": ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
             "modules_to_save", "trainable_token_indices", "use_rslora", "use_dora", "fan_in_fan_out", "target_parameters", "inference_mode"),
    "trainer": ("optim_args", "lr_scheduler_kwargs", "warmup_ratio", "label_smoothing_factor", "neftune_noise_alpha", "pad_to_multiple_of",
                "packing_strategy", "adam_beta1", "adam_epsilon", "dataloader_num_workers", "loss_type", "push_to_hub", "torch_compile_backend",
                "activation_checkpointing_kwargs", "eval_delay", "logging_strategy", "train_sampling_strategy", "padding_free"),
    "quant": ("llm_int8_skip_modules", "bnb_4bit_quant_storage", "llm_int8_threshold", "load_in_8bit"),
    "data": (),
    "model": ("dtype",),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration of the toy on a few rows, from which every case starts."""
    folder = tmp_path_factory.mktemp("small")
    for name, source in (("train", "train"), ("golden", "golden_test_set")):
        lines = (ROOT / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    cfg = composed(*TINY, f"data.train_file={folder}/train.jsonl", f"data.eval_file={folder}/golden.jsonl")
    return cfg, Run(folder / "run")


def keys(cfg):
    return [(group, key) for group in GROUPS for key in (*cfg[group], *ADDED[group])]


def verdict(cfg, run):
    """None, or the line that says what is wrong."""
    try:
        PlanPieces(cfg, run).take_all()
    except UserError as error:
        return str(error)
    return None


def test_any_value_of_any_key_makes_a_plan_or_one_line(small):
    cfg, run = small
    draw = random.Random(2024)
    faults = []
    cases = [(group, key, value) for group, key in keys(cfg) for value in draw.sample(ODD, 2)]
    for group, key, value in cases:
        changed = cfg.copy()
        with open_dict(changed):
            changed[group][key] = value
        try:
            told = verdict(changed, run)
        except Exception as error:  # what this test looks for
            faults.append(f"{group}.{key}={value!r}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if told is not None and (not told.strip() or "\n" in told):
            faults.append(f"{group}.{key}={value!r}: not one line: {told!r}")
    assert not faults, "\n".join(faults)


def test_the_configuration_that_every_case_starts_from_makes_a_plan(small):
    assert verdict(*small) is None


def test_any_value_of_any_generation_key_is_accepted_or_one_line():
    draw = random.Random(2024)
    names = [field.name for field in dataclasses.fields(check_generation({"max_new_tokens": 1}))]
    for key in (*names, "eos_token_id", "nope"):
        for value in draw.sample(ODD, 12):
            try:
                check_generation({"max_new_tokens": 8, "do_sample": True, key: value})
            except UserError as error:
                assert str(error).startswith(f"generation.{key}") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+lora.init_lora_weights=eva", "lora.init_lora_weights=eva: needs a pass over the data"),
        ("+lora.init_lora_weights=pissa", "lora.init_lora_weights=pissa: changes the base model's own weights"),
        ("+lora.inference_mode=true", "lora.inference_mode=true: nothing would be trained"),
        ("lora.target_modules=[q_proj,lm_head]", "lora.target_modules: reaches the model's output layer"),
        ("+lora.modules_to_save=[lm_head]", "lora.modules_to_save: reaches the model's output layer"),
        ("+lora.trainable_token_indices=[3,4,6]", "lora.trainable_token_indices: reaches the model's output layer"),
        ("lora.target_modules=[]", "lora.target_modules=[]: nothing would be trained"),
        ("+lora.rank_pattern={q_proj:-1}", "lora.r and the ranks of rank_pattern must be at least 1"),
        ("trainer.optim=galore_adamw", "trainer.optim=galore_adamw: cannot be made here"),
        ("+lora.velora_config={}", "lora.velora_config: not supported"),
        ("+trainer.lr_scheduler_kwargs={nope:1}", "trainer.lr_scheduler_kwargs={'nope': 1}: is refused"),
        ("+trainer.activation_checkpointing_kwargs=x", "trainer.activation_checkpointing_kwargs='x': must be names"),
        ("+trainer.loss_type=nope", "trainer.loss_type=nope: must be one of nll, dft, chunked_nll"),
        ("+trainer.log_level=nope", "trainer.log_level=nope: must be one of"),
        (
            "+trainer.dataloader_drop_last=true",
            "trainer.dataloader_drop_last: cannot be set here; every row is trained",
        ),
        ("+trainer.pad_token=nope", "trainer.pad_token: cannot be set here"),
        ("+trainer.eval_accumulation_steps=0", "trainer.eval_accumulation_steps=0: must be at least 1"),
        ("+trainer.dataloader_persistent_workers=true", "trainer.dataloader_persistent_workers=True: needs"),
        ("+trainer.torch_compile_backend=nope", "trainer.torch_compile_backend=nope: did you mean"),
        ("+trainer.pad_to_multiple_of=0", "trainer.pad_to_multiple_of=0: must be at least 1"),
        ("+trainer.push_to_hub=true", "trainer.push_to_hub: cannot be set here; nothing is uploaded"),
        ("+trainer.bf16_full_eval=true", "trainer.bf16_full_eval: cannot be set here"),
    ],
)
def test_what_would_fail_in_training_or_could_not_be_asked_is_refused_by_its_key(small, override, message):
    cfg, run = small
    told = verdict(composed(*TINY, f"data.train_file={cfg.data.train_file}", "data.eval_file=null", override), run)
    assert told is not None and told.startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        "+lora.rank_pattern=null",
        "+lora.trainable_token_indices=[]",
        "+lora.rank_pattern={q_proj:4,v_proj:8}",
        r"lora.target_modules='model\.layers\.(\d)+\.self_attn\.(q|v)_proj'",
    ],
)
def test_values_that_mean_something_are_accepted(small, override):
    cfg, run = small
    files = (f"data.train_file={cfg.data.train_file}", "data.eval_file=null")
    assert verdict(composed(*TINY, *files, override), run) is None
