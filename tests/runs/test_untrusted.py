"""Untrusted run directories and data files are refused in one line that names the file, and nothing in them acts."""

import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from intern.config.suggestions import unknown, with_origin
from intern.data.files import DataFile, checked_row, read_rows
from intern.data.prompt import IGNORED, Prompt
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.model.base import Base
from intern.runs.directory import Run
from intern.runs.find import resolve
from intern.runs.untrusted import yaml_mapping
from intern.training.rules import OF_VALUES, check_values

GREEDY = {"max_new_tokens": 4, "do_sample": False}


class Bomb:
    """Unpickled, it makes the canary file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def config(**values):
    """Changes keys of config.yaml: lora__r=3 is lora.r."""

    def change(run, canary):
        cfg = OmegaConf.to_container(OmegaConf.load(run.config))
        for key, value in values.items():
            *groups, last = key.split("__")
            node = cfg
            for group in groups:
                node = node[group]
            node[last] = value
        run.config.write_text(json.dumps(cfg))

    return change


def text(name, content):
    return lambda run, canary: (run.path / name).write_text(content)


def changed(name, **values):
    """Changes keys of a JSON file; a value None removes the key."""

    def change(run, canary):
        content = json.loads((run.path / name).read_text()) | values
        (run.path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def linked(name, target):
    def change(run, canary):
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    return change


def sparse(name, size):
    """A file that claims a size and takes no room."""

    def change(run, canary):
        with (run.path / name).open("r+b") as file:
            file.truncate(size)

    return change


def pickled(run, canary):
    (run.adapter / "adapter_model.safetensors").unlink()
    (run.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def pickled_beside(run, canary):
    (run.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def coded(run, canary):
    (run.adapter / "code.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Tokenizer: ...\n"
    )
    changed("adapter/tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})(run, canary)


def coded_base(run, canary):
    base = run.path / "base"
    base.mkdir()
    (base / "code.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Config: ...\n")
    (base / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')
    config(model__pretrained_model_name_or_path=str(base))(run, canary)


def adapter_as_base(run, canary):
    config(model__pretrained_model_name_or_path=str(run.adapter))(run, canary)


def tensors(change):
    def rewrite(run, canary):
        path = run.adapter / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return rewrite


def header(content):
    def write(run, canary):
        (run.adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)

    return write


def fifo(name):
    def change(run, canary):
        (run.path / name).unlink()
        os.mkfifo(run.path / name)

    return change


def added(name, *shape):
    return tensors(lambda weights: weights.update({name: torch.zeros(shape)}))


def filled(value):
    """Puts `value` into one element of the last tensor."""

    def change(weights):
        weights[max(weights)].view(-1)[-1] = value

    return tensors(change)


def typed(dtype):
    def change(weights):
        weights[max(weights)] = weights[max(weights)].to(dtype)

    return tensors(change)


def nulled(key):
    def change(run, canary):
        path = run.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))

    return change


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SLOW = r"(?:.|..)+[xq]_prox?j[0-9]"  # takes time that grows exponentially with the length of a name
WEIGHTS, ADAPTER, TOKENIZER = "adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"
BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'abcdefghij'[n]}: &{'abcdefghij'[n]} [{', '.join(['*' + 'abcdefghij'[n - 1]] * 9)}]\n" for n in range(1, 10)
)
# What is done to a good run, and the file that the message names.
RUNS = {
    "yaml references that multiply": (text("config.yaml", BILLION_LAUGHS), "config.yaml"),
    "yaml that makes an object": (text("config.yaml", "a: !!python/object/apply:os.system ['touch canary']"), "config.yaml"),
    "yaml nested without end": (text("config.yaml", "a: " + "[" * 5000), "config.yaml"),
    "yaml of a gigabyte": (sparse("config.yaml", 10**9), "config.yaml"),
    "a list for a configuration": (text("config.yaml", "[1, 2]"), "config.yaml"),
    "text for a group": (config(model="x"), "config.yaml"),
    "a value left open": (config(lora__r="???"), "config.yaml"),
    "numbers as keys": (text("config.yaml", "1: 2"), "config.yaml"),
    "no base model": (config(model={}), "config.yaml"),
    "a base model with code": (coded_base, "config.yaml"),
    "an adapter as the base model": (adapter_as_base, "config.yaml"),
    "a base model by a path that is none": (config(model__pretrained_model_name_or_path="/" + "x" * 5000), "config.yaml"),
    "a base model with a NUL": (config(model__pretrained_model_name_or_path="a\0b"), "config.yaml"),
    "remote code asked for": (config(model__trust_remote_code=True), "config.yaml"),
    "a kernel from the hub": (config(model__attn_implementation="someone/kernel"), "config.yaml"),
    "a quantization of nothing known": (config(quant__bnb_4bit_compute_dtype="load"), "config.yaml"),
    "a target in a group": (config(quant___target_="os.system"), "config.yaml"),
    "configuration by a link out": (linked("config.yaml", "/etc/hostname"), "config.yaml"),
    "a link to itself": (linked("config.yaml", "config.yaml"), "config.yaml"),
    "prompt by a link out": (linked("prompt.json", "/etc/passwd"), "prompt.json"),
    "prompt that waits for a writer": (fifo("prompt.json"), "prompt.json"),
    "prompt that is a device": (linked("prompt.json", "/dev/zero"), "prompt.json"),
    "prompt of a gigabyte": (sparse("prompt.json", 10**9), "prompt.json"),
    "prompt nested without end": (text("prompt.json", "[" * 100_000), "prompt.json"),
    "prompt with a number without end": (text("prompt.json", '{"template": ' + "1" * 10_000 + "}"), "prompt.json"),
    "prompt with infinity": (text("prompt.json", '{"template": Infinity}'), "prompt.json"),
    "template of three pieces": (changed("prompt.json", template=["a", "b", "c"]), "prompt.json"),
    "template of half characters": (changed("prompt.json", template=["\ud800", "b", "c", "d"]), "prompt.json"),
    "system prompt that is a number": (changed("prompt.json", system_prompt=5), "prompt.json"),
    "context that does not exist": (changed("prompt.json", context="../.."), "prompt.json"),
    "no stop": (changed("prompt.json", stop_ids=[]), "prompt.json"),
    "negative stop": (changed("prompt.json", stop_ids=[-1]), "prompt.json"),
    "weights as a pickle": (pickled, WEIGHTS),
    "a pickle beside the weights": (pickled_beside, "adapter_model.bin"),
    "code in the tokenizer": (coded, "code.py"),
    "code named by the tokenizer": (changed(f"adapter/{TOKENIZER}", auto_map={"AutoTokenizer": ["a/b--c.D", None]}), TOKENIZER),
    "a tokenizer with files elsewhere": (changed(f"adapter/{TOKENIZER}", vocab_file="/etc/passwd"), TOKENIZER),
    "a tokenizer that is no tokenizer": (changed(f"adapter/{TOKENIZER}", tokenizer_class="TrainingArguments"), TOKENIZER),
    "a tokenizer without a class": (changed(f"adapter/{TOKENIZER}", tokenizer_class=None), TOKENIZER),
    "a tokenizer of a gigabyte": (sparse("adapter/tokenizer.json", 10**9), "tokenizer.json"),
    "a broken tokenizer": (text("adapter/tokenizer.json", "{"), "adapter"),
    "a tokenizer nested without end": (text("adapter/tokenizer.json", '{"a":' * 100_000), "adapter"),
    "no tokenizer": (lambda run, canary: (run.adapter / "tokenizer.json").unlink(), "tokenizer.json"),
    "the adapter by a link out": (linked("adapter", "/tmp"), "adapter"),
    "weights by a link out": (linked(f"adapter/{WEIGHTS}", ROOT / "data/tiny_llama3/model.safetensors"), WEIGHTS),
    "a folder in the adapter": (lambda run, canary: (run.adapter / "inner").mkdir(), "inner"),
    "a rank of a billion": (changed(f"adapter/{ADAPTER}", r=10**9), ADAPTER),
    "a rank by a pattern": (changed(f"adapter/{ADAPTER}", rank_pattern={"q_proj": 10**9}), ADAPTER),
    "a negative rank": (changed(f"adapter/{ADAPTER}", r=-1), ADAPTER),
    "a rank that is text": (changed(f"adapter/{ADAPTER}", r="__import__('os')"), ADAPTER),
    "a module to import": (changed(f"adapter/{ADAPTER}", megatron_config={"a": 1}, megatron_core="antigravity"), ADAPTER),
    "classes to import": (changed(f"adapter/{ADAPTER}", auto_mapping={"base_model_class": "system", "parent_library": "os"}), ADAPTER),
    "layers without end": (changed(f"adapter/{ADAPTER}", layer_replication=[[0, 10**6]]), ADAPTER),
    "a pattern that takes forever": (changed(f"adapter/{ADAPTER}", target_modules=SLOW), ADAPTER),
    "a pattern that is none": (changed(f"adapter/{ADAPTER}", target_modules="*_proj"), ADAPTER),
    "another kind of adapter": (changed(f"adapter/{ADAPTER}", peft_type="XLORA", adapters={"a": "/etc"}), ADAPTER),
    "another task": (changed(f"adapter/{ADAPTER}", task_type="SEQ_CLS"), ADAPTER),
    "an unknown key": (changed(f"adapter/{ADAPTER}", on_load="os.system"), ADAPTER),
    "adapter settings of a gigabyte": (sparse(f"adapter/{ADAPTER}", 10**9), ADAPTER),
    "adapter settings that are a list": (text(f"adapter/{ADAPTER}", "[]"), ADAPTER),
    "weights that claim terabytes": (
        header(b'{"lora_A":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'),
        WEIGHTS,
    ),
    "a header that claims terabytes": (
        lambda run, canary: (run.adapter / WEIGHTS).write_bytes(struct.pack("<Q", 2**42) + b"{}"),
        WEIGHTS,
    ),
    "a header that is no JSON": (header(b"{" * 1000), WEIGHTS),
    "most weights missing": (tensors(lambda weights: [weights.pop(name) for name in list(weights)[1:]]), ADAPTER),
    "a weight missing": (tensors(lambda weights: weights.pop(next(iter(weights)))), WEIGHTS),
    "a weight of another shape": (tensors(lambda weights: weights.update({next(iter(weights)): torch.zeros(16, 7)})), WEIGHTS),
    "modules that do not exist": (changed(f"adapter/{ADAPTER}", target_modules=["nowhere"]), ADAPTER),
    "a weight of the base": (added("base_model.model.model.norm.weight", 256), WEIGHTS),
    "a base layer below an adapter": (added(f"{LAYER}.base_layer.weight", 256, 256), WEIGHTS),
    "embeddings of the base": (added("base_model.model.model.embed_tokens.weight", 3072, 256), WEIGHTS),
    "an adapter of one more module": (added("base_model.model.lm_head.lora_A.weight", 16, 256), WEIGHTS),
    "a tensor with a name of its own": (added("x", 1), WEIGHTS),
    "a NaN": (filled(float("nan")), WEIGHTS),
    "infinity": (filled(float("-inf")), WEIGHTS),
    "a weight that overflows": (filled(1e38), WEIGHTS),
    "integers": (typed(torch.int8), WEIGHTS),
    "booleans": (typed(torch.bool), WEIGHTS),
    "an initialization by OLoRA": (changed(f"adapter/{ADAPTER}", init_lora_weights="olora"), ADAPTER),
    "an initialization by PiSSA": (changed(f"adapter/{ADAPTER}", init_lora_weights="pissa_niter_4"), ADAPTER),
    "an initialization by LoftQ": (changed(f"adapter/{ADAPTER}", init_lora_weights="loftq"), ADAPTER),
    "an initialization that does not exist": (changed(f"adapter/{ADAPTER}", init_lora_weights="own"), ADAPTER),
    "weights cut down by KaSA": (changed(f"adapter/{ADAPTER}", kasa_config={"beta": 1.0}), ADAPTER),
    "biases of the base": (changed(f"adapter/{ADAPTER}", bias="all"), ADAPTER),
    "an infinite scale": (changed(f"adapter/{ADAPTER}", alpha_pattern={"q_proj": 1e308}), ADAPTER),
    "a huge scale": (changed(f"adapter/{ADAPTER}", lora_alpha=2**30), ADAPTER),
    "rank zero": (changed(f"adapter/{ADAPTER}", rank_pattern={"q_proj": 0}), ADAPTER),
    "a rank that is true": (changed(f"adapter/{ADAPTER}", rank_pattern={"q_proj": True}), ADAPTER),
    "no scale": (nulled("lora_alpha"), ADAPTER),
    "no rank": (nulled("r"), ADAPTER),
    "modules left out": (changed(f"adapter/{ADAPTER}", exclude_modules=["q_proj"]), ADAPTER),
    "modules to save that it lacks": (changed(f"adapter/{ADAPTER}", modules_to_save=["norm"]), ADAPTER),
    "DoRA without its magnitudes": (changed(f"adapter/{ADAPTER}", use_dora=True), ADAPTER),
    "another rank": (changed(f"adapter/{ADAPTER}", r=8), ADAPTER),
    "a pattern of thirty wildcards": (changed(f"adapter/{ADAPTER}", target_modules=".*" * 30 + "[xq]_proj"), ADAPTER),
    "a pattern that takes memory": (changed(f"adapter/{ADAPTER}", target_modules="(?:(?:a{1000}){1000}){1000}"), ADAPTER),
    "a pattern that takes memory, in a mapping": (changed(f"adapter/{ADAPTER}", rank_pattern={"(a{99}){99}": 16}), ADAPTER),
    "a slow pattern of modules left out": (changed(f"adapter/{ADAPTER}", exclude_modules=SLOW), ADAPTER),
    "a slow pattern of ranks": (changed(f"adapter/{ADAPTER}", rank_pattern={SLOW: 16}), ADAPTER),
    "a slow pattern of scales": (changed(f"adapter/{ADAPTER}", alpha_pattern={SLOW: 16}), ADAPTER),
    "a pattern of modules to save": (changed(f"adapter/{ADAPTER}", modules_to_save=["((a+)+)+$"]), ADAPTER),
    "a pattern of layers": (changed(f"adapter/{ADAPTER}", layers_pattern="(l|la)+", layers_to_transform=[0]), ADAPTER),
    "a pattern that ends no group": (changed(f"adapter/{ADAPTER}", target_modules="(q_proj"), ADAPTER),
    "weights by a link inside the run": (linked(f"adapter/{WEIGHTS}", "../environment.json"), WEIGHTS),
    "a number beyond floating point": (text("environment.json", '{"run_dir": 1e999}'), "environment.json"),
    "environment that waits for a writer": (fifo("environment.json"), "environment.json"),
}  # fmt: skip


@pytest.fixture
def untrusted(trained_run, tmp_path):
    copy = Run(tmp_path / "run")
    shutil.copytree(trained_run, copy.path, ignore=shutil.ignore_patterns("wandb", "checkpoints", ".hydra"))
    return copy


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_run_is_refused_before_a_model_loads(name, untrusted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    change, file = RUNS[name]
    change(untrusted, canary)
    with pytest.raises(UserError) as caught:
        if file == "adapter":  # of tokenizer.json only the tokenizer's own reader can judge
            monkeypatch.undo()
        start = time.monotonic()
        Intern(untrusted, GREEDY)
    assert time.monotonic() - start < 20
    said = str(caught.value)
    assert f"/{file}" in said and "\n" not in said and len(said) < 7000, said
    assert not canary.exists()


def test_what_a_configuration_would_look_up_stays_text(untrusted, monkeypatch):
    monkeypatch.setenv("CANARY", "secret")
    asks = "Say ${oc.env:CANARY} and ${oc.decode:'1'} \\${data.context} ${unclosed"
    config(data__system_prompt=asks)(untrusted, None)
    cfg = untrusted.read_config()
    assert cfg.data.system_prompt == asks
    assert OmegaConf.to_container(cfg, resolve=True)["data"]["system_prompt"] == asks
    untrusted.write_config(cfg)
    assert untrusted.read_config().data.system_prompt == asks and "secret" not in untrusted.config.read_text()


def test_the_adapters_own_word_for_its_base_is_not_followed_and_a_run_from_elsewhere_says_its_base(untrusted, caplog):
    changed(f"adapter/{ADAPTER}", base_model_name_or_path="/nowhere", revision="x")(untrusted, None)
    assert isinstance(Intern(untrusted, GREEDY).answer("How much?"), str)
    assert f"the base model that it names is {ROOT}/data/tiny_llama3" in caplog.text


def test_one_broken_run_among_others_is_never_the_best(untrusted, tmp_path):
    for index, loss in enumerate(("1" + "0" * 400, "true", "null", '"a"')):
        other = tmp_path / "outputs" / str(index)
        other.mkdir(parents=True)
        shutil.copy(untrusted.config, other)
        (other / "metrics.json").write_text(f'{{"eval_loss": {loss}}}')
    shutil.move(untrusted.path, tmp_path / "outputs/z")
    assert resolve("best", tmp_path).path.name == "z"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**5, "not JSON"),
        (b'{"question": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"question": "a", "answer": "' + b"x" * (2**24 + 1) + b'"}', "longer than 16 MiB"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"\x00" * 100, "not JSON"),
        (b'{"question": "a\\u0000", "answer": "b"}', "no text"),
        (b'{"question": "a", "answer": "\\ud800"}', "no text"),
        (b'{"question": {"__reduce__": "os.system"}, "answer": "b"}', "is dict"),
        (b'{"question": "a", "answer": "b", "seen_chunk": "yes"}', "not true or false"),
        (b'{"question": "a", "answer": NaN}', "is float"),
        (b'[{"question": "a"}]', "a JSON list"),
        (b"", "has no rows"),
    ],
)
def test_a_hostile_data_file_is_named_with_its_row(content, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=reason) as caught:
        read_rows(DataFile.find(str(path), "data.train_file"), needs_material=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem/x", "~nobody-here/x", "a\0b", "x" * 5000, "."])
def test_a_data_file_that_is_no_file_is_refused(path):
    with pytest.raises(UserError, match="data.train_file="):
        DataFile.find(path, "data.train_file")


# --- thousands of chance inputs ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=3,
)
ROW = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("question", "answer", "chunk_text", "chunk_id", "topic", "seen_chunk", "more"), JSON),
)
TEXT = st.text(max_size=60) | st.sampled_from(
    ["<|eot_id|>", "<|begin_of_text|>", "Material:\n", "\n\nQuestion: ", "\ue000user\ue000", "{{ x }}"]
)


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=80) | ROW.map(lambda row: json.dumps(row).encode()), st.booleans())
def test_any_line_is_a_row_of_text_or_refused_with_its_place(line, needs_material):
    try:
        row = checked_row(line, "rows.jsonl:7", needs_material)
    except UserError as error:
        assert str(error).startswith("rows.jsonl:7: ")
        return
    assert row["question"].strip() and row["answer"].strip()
    for value in (row[name] for name in ("question", "answer", "chunk_text", "chunk_id", "topic")):
        assert value is None or value.encode()
    assert not needs_material or row["chunk_text"].strip()


@pytest.fixture(scope="module")
def tokenizer():
    return Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"})).tokenizer()


@settings(max_examples=2000, deadline=None)
@given(question=TEXT, answer=TEXT, material=st.none() | TEXT, system=TEXT, most=st.none() | st.integers(8, 120))
def test_any_text_is_asked_as_it_was_trained(tokenizer, question, answer, material, system, most):
    whole = Prompt(system.strip(), "mixed", ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|eot_id|>"), (2,))
    [row] = whole.encode(tokenizer, [question], [answer], [material], most)
    end, begin = (tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|begin_of_text|>"))
    if row is None:
        assert most is not None
        return
    learned = [label for label in row.labels if label != IGNORED]
    assert len(row.input_ids) == len(row.labels) and (most is None or len(row.input_ids) <= most)
    assert row.input_ids.count(end) == 3 and row.input_ids.count(begin) == 1  # none from the texts
    assert learned[-1] == end and row.labels[-len(learned) :] == learned and end not in learned[:-1]
    if not row.context_tokens_cut:
        [asked] = whole.encode(tokenizer, [question], None, [material])
        assert asked.input_ids == row.input_ids[: -len(learned)]


GROUPS = {
    name: OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / name / f"{option}.yaml"))
    for name, option in (("model", "tiny"), ("quant", "nf4_fp16"), ("lora", "qkvo"), ("trainer", "t4_min100"), ("data", "train_jsonl"), ("logger", "wandb"))
}  # fmt: skip
KEYS = [(group, key) for group, values in GROUPS.items() for key in values]


@settings(max_examples=2000, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(KEYS) | st.tuples(st.sampled_from(list(GROUPS)), st.text(max_size=8)), JSON, max_size=4
    )
)
@example({("quant", "bnb_4bit_quant_type"): "\n"})
def test_any_configuration_passes_or_is_refused_by_key(changes):
    cfg = {"seed": 1} | {group: dict(values) for group, values in GROUPS.items()}
    for (group, key), value in changes.items():
        cfg[group][key] = value
    try:
        check_values(cfg)
    except UserError as error:
        assert str(error).partition(".")[0] in GROUPS and "\n" not in str(error).replace("\\n", "")
        assert changes
        return
    assert all(rule(cfg) is None for rule in OF_VALUES)


@settings(max_examples=2000, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=12), max_size=5))
def test_any_wrong_name_gets_an_answer(key, known):
    said = unknown(key, known, "lora")
    assert said.startswith(f"lora.{key}: unknown key; ")
    assert with_origin(said, [], {"lora": "qkvo"}, [ROOT / "conf"]).startswith(said)


@settings(max_examples=2000, deadline=None)
@given(value=TEXT | st.from_regex(r"\A(\\{0,3}\$\{[a-z:.]{0,6}\}?){1,3}\Z"))
def test_any_text_in_a_configuration_comes_back_as_it_was(tmp_path_factory, value):
    run = Run(tmp_path_factory.getbasetemp())
    run.config.write_text(yaml.safe_dump({"data": {"system_prompt": value}}))
    if value == "???":
        return
    assert OmegaConf.create(yaml_mapping(run.config, run.path)).data.system_prompt == value
