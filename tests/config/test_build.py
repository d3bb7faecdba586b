"""Every option of every group composes and builds; mistakes are named."""

from pathlib import Path

import pytest
import torch
from helpers import composed
from omegaconf import OmegaConf
from peft import LoraConfig
from trl import SFTConfig

from intern.config.build import build
from intern.data.prompt import Prompt
from intern.data.settings import DataConfig, resolved
from intern.errors import UserError
from intern.inference.generation_values import check_generation
from intern.model.base import Base
from intern.model.lora import build_lora
from intern.model.precision import Precision
from intern.model.quant import build_quant
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.training.arguments import build_rules, build_training_args
from intern.training.trackers import check_logger

GROUPS = {
    group: sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    for group in ("model", "quant", "lora", "trainer", "data", "logger", "experiment", "generation")
}


def training_args(cfg, path, evaluates=True):
    return build_training_args(cfg.trainer, Run(path), Precision("cpu", torch.float32, False, False), 7, evaluates)


def test_the_groups_have_the_promised_options():
    assert GROUPS["model"] == ["llama32_1b", "llama3_8b", "llama3_8b_nf4", "smollm2_135m", "tiny"]
    assert GROUPS["quant"] == ["int8", "nf4_bf16", "nf4_fp16", "none"]
    assert GROUPS["lora"] == ["all_linear", "all_linear_rslora", "dora", "qkvo"]
    assert GROUPS["trainer"] == ["ampere", "cpu_min100", "t4_min100"]
    assert GROUPS["data"] == ["train_jsonl"]
    assert GROUPS["logger"] == ["none", "tensorboard", "wandb"]
    assert GROUPS["experiment"] == ["rank_sweep", "smollm2_cpu", "tiny_cpu"]
    assert GROUPS["generation"] == ["greedy", "sample"]


def test_the_defaults_are_the_t4_recipe():
    cfg = composed()
    assert cfg.model.pretrained_model_name_or_path == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (cfg.quant.bnb_4bit_quant_type, cfg.quant.bnb_4bit_compute_dtype) == ("nf4", "float16")
    assert cfg.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (cfg.trainer.fp16, cfg.trainer.min_steps, cfg.trainer.per_device_train_batch_size) == (True, 100, 1)


@pytest.mark.parametrize("name", GROUPS["quant"])
def test_every_quant_builds(name):
    quant = build_quant(composed(f"quant={name}").quant)
    if name == "none":
        assert quant is None
    elif name == "int8":
        assert quant.config.load_in_8bit and quant.compute_dtype is None
    else:
        assert quant.config.load_in_4bit and quant.config.bnb_4bit_use_double_quant
        assert quant.compute_dtype == {"nf4_fp16": torch.float16, "nf4_bf16": torch.bfloat16}[name]


@pytest.mark.parametrize("name", GROUPS["lora"])
def test_every_lora_builds(name):
    lora = build_lora(composed(f"lora={name}", "lora.r=7").lora)
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.use_dora, lora.use_rslora) == (7, name == "dora", name == "all_linear_rslora")


@pytest.mark.parametrize("name", GROUPS["trainer"])
def test_every_trainer_builds(name, tmp_path):
    cfg = composed(f"trainer={name}", "trainer.max_steps=123")
    assert build_rules(cfg.trainer).min_steps == 100
    args = training_args(cfg, tmp_path)
    assert isinstance(args, SFTConfig)
    assert (args.max_steps, args.seed, args.output_dir) == (123, 7, str(tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", GROUPS["logger"])
def test_every_logger_builds(name):
    assert bool(check_logger(composed(f"logger={name}").logger)) is (name != "none")


@pytest.mark.parametrize("name", GROUPS["data"])
def test_every_data_group_builds(name):
    data = resolved(build(DataConfig, OmegaConf.to_container(composed(f"data={name}").data), "data"))
    assert data.context == "never" and "Intern" in data.system_prompt


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_composes_into_a_whole_configuration(name):
    cfg = composed(f"experiment={name}", "lora.r=3", "seed=5")
    assert set(cfg) == {
        "name",
        "notes",
        "num_processes",
        "resume",
        "seed",
        "model",
        "quant",
        "lora",
        "trainer",
        "data",
        "logger",
    }
    assert (cfg.lora.r, cfg.seed) == (3, 5)


def test_an_experiment_wins_over_the_groups():
    assert composed("experiment=tiny_cpu").quant.bnb_4bit_compute_dtype == "float32"
    assert (
        composed("experiment=tiny_cpu", "quant.bnb_4bit_compute_dtype=bfloat16").quant.bnb_4bit_compute_dtype
        == "bfloat16"
    )


@pytest.mark.parametrize("name", GROUPS["generation"])
def test_every_generation_builds(name):
    base = Base(composed("model=tiny").model)
    tokenizer = base.tokenizer()
    prompt = Prompt.from_tokenizer(tokenizer, "Be brief.", "never")
    node = composed(f"generation={name}", "generation.max_new_tokens=5", name="query").generation
    generation = check_generation(node).config(prompt, tokenizer)
    assert (generation.max_new_tokens, generation.do_sample) == (5, name == "sample")
    assert generation.eos_token_id == list(prompt.stop_ids)


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_group_names_a_model_and_only_known_keys(name):
    node = composed(f"model={name}").model
    if name == "tiny":
        assert Base(node).parameters() > 1e6
    else:
        with pytest.raises(UserError, match="hub cannot be reached|local cache"):
            Base(node)


@pytest.mark.parametrize(
    ("maker", "override", "message"),
    [
        (lambda c, p: build_lora(c.lora), "+lora.rank=8", "lora.rank: unknown key"),
        (lambda c, p: build_lora(c.lora), "lora.r=abc", "lora.r='abc'"),
        (lambda c, p: build_quant(c.quant), "+quant.bnb_4bit_quanttype=nf4", "did you mean quant.bnb_4bit_quant_type"),
        (lambda c, p: build_quant(c.quant), "quant.bnb_4bit_compute_dtype=float17", "quant"),
        (lambda c, p: build_rules(c.trainer), "trainer.min_steps=many", "trainer.min_steps='many'"),
        (lambda c, p: check_logger(c.logger), "logger.mode=sometimes", "logger.mode=sometimes"),
        (lambda c, p: check_logger(c.logger), "+logger.projct=x", "did you mean logger.project"),
        (lambda c, p: check_logger(c.logger), "logger.sample_answers=some", "logger.sample_answers=some"),
        (training_args, "trainer.learning_rate=fast", "trainer.learning_rate='fast'"),
        (training_args, "+trainer.lr=1", "trainer.lr: unknown key"),
        (training_args, "+trainer.output_dir=x", "hydra.run.dir"),
        (lambda c, p: training_args(c, p, evaluates=False), "trainer.eval_strategy=steps", "data.eval_file"),
        (training_args, "trainer.optim=sgdd", "trainer"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_group_and_key(maker, override, message, tmp_path):
    cfg = composed(override)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        maker(cfg, tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_that_a_run_keeps_of_its_configuration_names_code():
    named = {path for path in Path(CONF_DIR).rglob("*.yaml") if "_target_" in path.read_text(encoding="utf-8")}
    # What a run keeps is the configuration without its hydra node, to which launchers and callbacks belong.
    assert named == {
        CONF_DIR / "train.yaml",
        *(
            CONF_DIR / f"hydra/{name}.yaml"
            for name in ("launcher/process", "launcher/serial", "launcher/slurm", "sweeper/optuna")
        ),
    }
    assert "_target_" not in OmegaConf.to_yaml(composed("experiment=rank_sweep", "hydra/launcher=gpus"))
