"""Each kind of mistake in a configuration: caught before any weights load, and told in the words of messages.json."""

import json
import os

import pytest
import torch
import transformers
from helpers import ROOT
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.cli.command import _composition_fault
from intern.config.suggestions import with_origin
from intern.errors import UserError
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.training import rules
from intern.training.finetune import finetune
from intern.training.rules import RANGES, _words

SNAPSHOT = ROOT / "tests" / "messages.json"
CASES = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 3072,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files that the cases name."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"question": "q", "answer": "a", "chunk_text": "c"}\n{"question"\n')
    (folder / "experiment").mkdir()
    for name, text in (
        ("wrong_key", "lora: {rnak: 8}"),
        ("wrong_value", "trainer: {learning_rate: -1}"),
        ("wrong_group", "data: 5"),
    ):
        (folder / "experiment" / f"{name}.yaml").write_text(
            f"# @package _global_\ndefaults:\n  - tiny_cpu\n  - _self_\n{text}\n"
        )
    for name, config in (
        ("bloom", {"model_type": "bloom", "n_layer": 1, "hidden_size": 64, "n_head": 2, "vocab_size": 3072}),
        ("mistral", SMALL | {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 512}),
        ("small", SMALL | {"model_type": "llama", "vocab_size": 100}),
        ("mute", SMALL | {"model_type": "llama"}),
        (
            "own",
            {
                "model_type": "gpt_neo",
                "num_layers": 1,
                "attention_types": [[["global"], 1]],
                "hidden_size": 64,
                "vocab_size": 3072,
            },
        ),
        ("coded", {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Stranger"}}),
        ("adapter", SMALL | {"model_type": "llama"}),
    ):
        (folder / name).mkdir()
        for file in (ROOT / "data" / "tiny_llama3").glob("*token*"):
            (folder / name / file.name).symlink_to(file)
        (folder / name / "chat_template.jinja").symlink_to(ROOT / "data" / "tiny_llama3" / "chat_template.jinja")
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "mute" / "chat_template.jinja").unlink()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    return folder


BROKEN: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def noted():
    """Which rules have complained."""
    before = rules.OF_VALUES, rules.OF_SHAPE

    def noting(rule):
        def same(*arguments):
            complaint = rule(*arguments)
            if complaint is not None:
                BROKEN.add(rule.__name__)
            return complaint

        return same

    rules.OF_VALUES, rules.OF_SHAPE = (tuple(noting(rule) for rule in some) for some in before)
    yield
    rules.OF_VALUES, rules.OF_SHAPE = before


def message(overrides, given, path, monkeypatch):
    """What a user reads, by the same ways as in the command: composing, planning, and the place that set the key."""

    def weights(*arguments, **values):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", weights)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "quant=nf4_bf16" in overrides and "trainer=ampere" in overrides:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("intern.training.finetune._forget_previous_job", lambda: None)  # there was none
    places = {name.stem: str(name) for name in given.iterdir()}
    overrides = [text.format(**places) if "path=" in text or "file=" in text else text for text in overrides]
    search = [f"hydra.searchpath=[file://{given}]"] if overrides[0].startswith("experiment=wrong") else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            cfg = compose("train", overrides=[*overrides, *search], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            return _composition_fault(error)
    hydra = cfg.hydra
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(UserError) as caught:
        finetune(cfg, Run(path))
    said = with_origin(str(caught.value), hydra.overrides.task, hydra.runtime.choices, [given, CONF_DIR])
    assert list(path.iterdir()) == [], "something was written for a configuration that was refused"
    return said


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_one_good_line_before_any_weights_load(name, given, tmp_path, monkeypatch):
    said = message(CASES[name]["overrides"], given, tmp_path, monkeypatch)
    said = said.replace(str(given), "GIVEN").replace(str(ROOT), "PROJECT")
    if os.environ.get("REWRITE_MESSAGES"):  # then read the difference as a user would
        SNAPSHOT.write_text(json.dumps(CASES | {name: CASES[name] | {"message": said}}, indent=1) + "\n")
        CASES[name]["message"] = said
    assert said == CASES[name]["message"]
    assert "\n" not in said


def test_every_rule_is_broken_by_one_of_the_mistakes(request):
    if sum(item.path == request.path for item in request.session.items) <= len(CASES):
        pytest.skip("only some of the mistakes were made")
    every = {
        name
        for name, value in vars(rules).items()
        if callable(value) and getattr(value, "__doc__", None) and _is_rule(name)
    }
    assert len(every) > 20 and every == BROKEN


def _is_rule(name):
    """A rule is a function of rules.py whose first argument is the configuration and whose result may be a complaint."""
    function = getattr(rules, name)
    return (
        getattr(function, "__module__", "") == rules.__name__
        and getattr(function, "__annotations__", {}).get("return") == str | None
    )


def test_every_range_is_read_as_it_is_meant():
    assert {_words(interval) for interval, _ in RANGES.values()} == {
        "at least 0", "at least 1", "above 0", "at least 0 and below 1", "at least 0 and at most 4294967295",
    }  # fmt: skip


@pytest.mark.parametrize("attention", ["isolated", "sdpa", "eager"])
def test_the_attentions_that_packing_is_allowed_with_keep_rows_apart(attention):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from intern.kernels.isolated_attention import register

    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation=attention).eval()
    rows = [torch.randint(0, 3000, (1, length)) for length in (5, 9, 3)]
    boundaries = torch.tensor([0, 5, 14, 17], dtype=torch.int32)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows, dim=1),
            position_ids=torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
            use_cache=False,
            **({"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 9, "max_length_k": 9}),
        ).logits.split([5, 9, 3], dim=1)
        for row, logits in zip(rows, packed, strict=True):
            assert torch.allclose(model(input_ids=row, use_cache=False).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "without"),
    [
        ("LlamaConfig", {}, True),
        ("LlamaConfig", {"packing": True}, False),  # packs have none anyway
        ("LlamaConfig", {"per_device_train_batch_size": 1}, False),
        ("LlamaConfig", {"attn_implementation": "sdpa"}, False),  # its mask would be the whole batch long and wide
        ("MistralConfig", {"sliding_window": 512}, False),
        ("BloomConfig", {}, False),  # has no positions to tell rows apart by
        ("Mamba2Config", {}, False),  # carries state along
    ],
)
def test_unpacked_batches_lie_end_to_end_only_where_rows_stay_apart(kind, changes, without):
    small = SMALL | ({"sliding_window": changes["sliding_window"]} if "sliding_window" in changes else {})
    if kind == "Mamba2Config":
        small = {"num_hidden_layers": 1, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "vocab_size": 64}
    config = getattr(transformers, kind)(**small)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    trainer = {"packing": False, "per_device_train_batch_size": 4, "max_length": 1024}
    cfg = {
        "model": {"attn_implementation": changes.get("attn_implementation", "isolated")},
        "trainer": {name: changes.get(name, value) for name, value in trainer.items()},
    }
    assert rules.batches_need_no_padding(cfg, lambda: rules.Shape(config, model, None)) == without
