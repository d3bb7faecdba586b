"""Merging: the exported model is the evaluated one, and a broken export is found by the part that is broken."""

import contextlib
import dataclasses
import json

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM, GenerationConfig

from intern.exporting import merge
from intern.exporting.formats import FORMATS
from intern.exporting.job import write_model
from intern.exporting.proof import compare, faults

LIMIT = 0.001


def proven(job, reference, folder):
    consumer = FORMATS["merged"].consumer(job, folder)
    figures = compare(reference, consumer)
    consumer.close()
    return figures


def fault(job, reference, folder):
    """The last fault of a broken export: of the weights, if they differ."""
    return faults(proven(job, reference, folder), LIMIT)[-1]


@contextlib.contextmanager
def scaled(model, factor, part=""):
    layers = [module for name, module in model.named_modules() if isinstance(module, LoraLayer) and part in name]
    assert layers
    for layer in layers:
        layer.scaling = {name: scale * factor for name, scale in layer.scaling.items()}
    yield
    for layer in layers:
        layer.scaling = dict.fromkeys(layer.scaling, 2.0)


def test_a_merged_model_is_the_evaluated_one(job, reference, tmp_path):
    write_model(job, tmp_path)
    figures = proven(job, reference, tmp_path)
    assert faults(figures, LIMIT) == []
    assert figures.mean_kl < 0.0002
    assert figures.templates_equal == figures.prompts == figures.answers_equal == 6
    assert figures.stops == figures.reference_stops > 0


@pytest.mark.parametrize(
    ("factor", "part"), [(1.1, ""), (0.0, ".layers.1.")], ids=["scaled by 1.1", "a layer left out"]
)
def test_an_adapter_that_was_not_merged_as_it_was_trained_is_found(job, reference, tmp_path, factor, part):
    with scaled(job.loaded.model, factor, part):
        write_model(job, tmp_path)
    assert fault(job, reference, tmp_path).startswith("weights: mean KL divergence")


def test_a_merge_inside_4_bits_is_found(job, reference, tmp_path, monkeypatch):
    plain = merge.merged_tensors

    def rounded(*arguments):
        for name, weight in plain(*arguments):
            if name.endswith("proj.weight"):
                weight = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight.float(), quant_type="nf4"))
            yield name, weight

    monkeypatch.setattr(merge, "merged_tensors", rounded)
    write_model(job, tmp_path)
    assert fault(job, reference, tmp_path).startswith("weights: mean KL divergence")


def test_original_weights_are_another_model(job, reference, tmp_path):
    job.settings = dataclasses.replace(job.settings, weights="original")
    write_model(job, tmp_path)
    assert fault(job, reference, tmp_path).startswith("weights: mean KL divergence")


def test_a_wrong_template_is_found(job, reference, tmp_path):
    write_model(job, tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(template.replace("\n\n' + turn", "\n' + turn"), encoding="utf-8")
    found = faults(proven(job, reference, tmp_path), LIMIT)
    assert found[0] == "chat template: 6 of 6 prompts become other tokens than in training"


def test_a_lost_stop_token_is_found(job, reference, tmp_path):
    write_model(job, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}), encoding="utf-8")
    GenerationConfig(do_sample=False, pad_token_id=2).save_pretrained(tmp_path)
    assert fault(job, reference, tmp_path).startswith("stop tokens: 0 of 6 answers end by themselves")


def test_shards_hold_the_same_weights_as_one_file(job, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_model(job, tmp_path / "one")
    model, skeleton = job.loaded.model, job.base.skeleton
    merge.write_merged(model, skeleton, tmp_path / "many", torch.bfloat16, None, shard=1_000_000)
    (tmp_path / "many" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
