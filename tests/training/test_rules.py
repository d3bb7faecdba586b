"""Each kind of mistake in a configuration: found before any weights load, by every command, in the words of messages.json."""

import json
import os
import re

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
from intern.inspection.check import RED
from intern.inspection.doctor import diagnose
from intern.inspection.preview import prepare
from intern.model.attention import choose_attention
from intern.paths import CONF_DIR
from intern.runs.directory import Run
from intern.training import model_rules, rules
from intern.training.finetune import finetune
from intern.training.plan import build_plan
from intern.training.rules import RANGES, _words

SNAPSHOT = ROOT / "tests" / "messages.json"
CASES = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
# What only the commands that ask this machine's GPU can know. The preview shows the same rows on any machine, and works without a GPU.
OF_THIS_MACHINE = {"no GPU", "bf16 on a T4"}
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
        ("small", SMALL | {"model_type": "llama", "vocab_size": 100}),
        ("mute", SMALL | {"model_type": "llama"}),
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
    """Record which rules have complained."""
    places = [(rules, "OF_VALUES"), (model_rules, "OF_MODEL"), (model_rules, "OF_ADAPTER")]

    def noting(rule):
        def same(*arguments):
            complaint = rule(*arguments)
            if complaint is not None:
                BROKEN.add(rule.__name__)
            return complaint

        return same

    with pytest.MonkeyPatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, tuple(noting(rule) for rule in getattr(module, name)))
        yield


@pytest.fixture(autouse=True)
def machine(request, monkeypatch):
    """A machine without a GPU, on which no weights can be loaded; with a T4 for the cases that name one."""

    def weights(*arguments, **values):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", weights)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "T4" in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


class Case:
    """A mistake as a command gets it: composed like its configuration, and told with the place that set the key."""

    def __init__(self, command, overrides, given):
        places = {name.stem: str(name) for name in given.iterdir()}
        overrides = [text.format(**places) if "path=" in text or "file=" in text else text for text in overrides]
        search = [f"hydra.searchpath=[file://{given}]"] if overrides[0].startswith("experiment=wrong") else []
        self.given, self.cfg, self.message = given, None, None
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            try:
                cfg = compose(command, overrides=[*overrides, *search], return_hydra_config=True)
            except (HydraException, OmegaConfBaseException) as error:
                self.message = self.without_paths(_composition_fault(error))
                return
        self.hydra = cfg.hydra
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        OmegaConf.set_struct(cfg, True)
        self.cfg = cfg

    def told(self, error):
        overrides, choices = self.hydra.overrides.task, self.hydra.runtime.choices
        return self.without_paths(with_origin(str(error), overrides, choices, [self.given, CONF_DIR]))

    def without_paths(self, text):
        return text.replace(str(self.given), "GIVEN").replace(str(ROOT), "PROJECT")


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_one_good_line_before_any_weights_load(name, given, tmp_path, monkeypatch):
    monkeypatch.setattr("intern.training.finetune._forget_previous_job", lambda: None)  # there was none
    case = Case("train", CASES[name]["overrides"], given)
    said = case.message
    if said is None:
        with pytest.raises(UserError) as caught:
            finetune(case.cfg, Run(tmp_path))
        said = case.told(caught.value)
        assert list(tmp_path.iterdir()) == [], "something was written for a configuration that was refused"
    if os.environ.get("REWRITE_MESSAGES"):  # then read the difference as a user would
        SNAPSHOT.write_text(json.dumps(CASES | {name: CASES[name] | {"message": said}}, indent=1) + "\n")
        CASES[name]["message"] = said
    assert said == CASES[name]["message"]
    assert "\n" not in said


@pytest.mark.parametrize("name", CASES)
def test_the_preview_refuses_what_training_refuses_with_the_same_message(name, given):
    case = Case("preview", [*CASES[name]["overrides"], "lengths=null"], given)
    if name in OF_THIS_MACHINE:
        assert prepare(case.cfg).packs
    elif case.message is not None:
        assert case.message == CASES[name]["message"]
    else:
        with pytest.raises(UserError) as caught:
            prepare(case.cfg)
        assert case.told(caught.value) == CASES[name]["message"]


@pytest.mark.parametrize("name", CASES)
def test_the_doctor_has_a_red_line_for_what_training_refuses_with_the_same_message(name, given, tmp_path):
    case = Case("doctor", [*CASES[name]["overrides"], f"run_dir={tmp_path}"], given)
    if case.message is not None:
        assert case.message == CASES[name]["message"]
        return
    red = [check for check in diagnose(case.cfg) if check.status == RED]
    if name == "no GPU":  # the doctor says more about it: driver and build of torch
        assert "GPU" in [check.name for check in red]
    else:
        told = [f"{check.found}: {check.remedy}" if check.remedy else check.found for check in red]
        assert CASES[name]["message"] in [case.told(text) for text in told]


def test_two_mistakes_about_the_adapter_are_found_by_every_command(given, tmp_path):
    overrides = ["experiment=tiny_cpu", "lora.target_modules=[q_proj,v_porj]", "lora.r=400"]
    refused = "the model has no v_porj; did you mean v_proj?"
    with pytest.raises(UserError, match=re.escape(refused)):
        build_plan(Case("train", overrides, given).cfg, Run(tmp_path))
    with pytest.raises(UserError, match=re.escape(refused)):
        prepare(Case("preview", overrides, given).cfg)
    adapter = next(check for check in diagnose(Case("doctor", overrides, given).cfg) if check.name == "adapter")
    assert adapter.status == RED and refused in adapter.remedy


def test_every_rule_is_broken_by_one_of_the_mistakes(request):
    made = [item for item in request.session.items if item.name.startswith("test_a_mistake_is_told_in_one_good_line")]
    if len(made) < len(CASES):
        pytest.skip("only some of the mistakes were made")
    every = {
        name
        for module in (rules, model_rules)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__doc__", None) and _is_rule(module, name)
    }
    assert len(every) > 20 and every == BROKEN


def _is_rule(module, name):
    """A rule is a public function that takes the configuration or the model and may return a complaint."""
    function = getattr(module, name)
    return (
        getattr(function, "__module__", "") == module.__name__
        and getattr(function, "__annotations__", {}).get("return") == str | None
        and not name.startswith("_")
    )


def test_every_range_is_read_as_it_is_meant():
    assert {_words(interval) for interval, _ in RANGES.values()} == {
        "at least 0", "at least 1", "above 0", "at least 0 and below 1", "between 0 and 4294967295", "between 0 and 512", "between 1 and 512",
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
    trainer = {"packing": False, "per_device_train_batch_size": 4, "max_length": 1024}
    cfg = {
        "model": {"attn_implementation": changes.get("attn_implementation", "isolated")},
        "trainer": {name: changes.get(name, value) for name, value in trainer.items()},
    }
    attention = choose_attention(config, cfg["model"]["attn_implementation"], 1024)
    assert model_rules.batches_need_no_padding(cfg, lambda: attention) == without
