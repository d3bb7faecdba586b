"""Adapter, GGUF and Ollama: each is loaded by the program that it is for; the card, the hub, servers."""

import dataclasses
import json
import re

import pytest
import yaml
from helpers import command
from huggingface_hub import ModelCard
from peft import PeftConfig

from intern.errors import RunError, UserError
from intern.exporting import gguf, hub, ollama
from intern.exporting.adapter_folder import write_adapter
from intern.exporting.export import Export, _record, _write_card, open_export, sizes_of
from intern.exporting.formats import FORMATS
from intern.exporting.gguf_types import quantize
from intern.exporting.job import with_arguments
from intern.exporting.landing import landing
from intern.exporting.llama_server import LlamaServer
from intern.exporting.proof import compare, faults
from intern.exporting.served import ask_server, served_faults


def proven(job, reference, name, folder):
    consumer = FORMATS[name].consumer(job, folder)
    figures = compare(reference, consumer)
    consumer.close()
    assert faults(figures, FORMATS[name].limit(job.settings)) == []
    return figures


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    """An Ollama export, which has a GGUF file."""
    folder = tmp_path_factory.mktemp("ollama")
    settings = dataclasses.replace(loaded[0].settings, gguf="f16")
    ollama.write(dataclasses.replace(loaded[0], settings=settings), folder)
    return folder


# --- adapter


def test_an_adapter_is_loaded_by_plain_peft(job, reference, tmp_path):
    write_adapter(job, tmp_path)
    figures = proven(job, reference, "adapter", tmp_path)
    assert figures.mean_kl < 1e-6
    assert figures.answers_equal == figures.prompts
    values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert values["base_model_name_or_path"] == "tiny_llama3"
    assert str(job.run.path) not in json.dumps(values)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"


def test_the_code_of_an_adapters_card_runs(job, tmp_path, monkeypatch, capsys):
    job.base_name = job.base.name  # a folder, since there is no network
    write_adapter(job, tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", FORMATS["adapter"].ask(job), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=256", "max_new_tokens=3").replace("torch.bfloat16", "torch.float32"), {})
    assert capsys.readouterr().out.strip()


# --- GGUF and Ollama


def test_a_gguf_file_answers_in_llama_cpp_as_the_evaluated_model(job, reference, folder):
    job.settings = dataclasses.replace(job.settings, gguf="f16")
    figures = proven(job, reference, "gguf", folder)
    assert figures.templates_equal == figures.prompts
    assert figures.top1_agreement > 0.98
    assert figures.stops == figures.reference_stops
    assert sorted(file.name for file in folder.iterdir()) == ["Modelfile", "model.gguf"]


def test_a_gguf_file_of_another_model_is_found(job, reference, folder):
    others = dataclasses.replace(reference, log_probs=[one.flip(0) for one in reference.log_probs])
    consumer = FORMATS["gguf"].consumer(job, folder)
    assert "weights: mean KL divergence" in faults(compare(others, consumer), 0.3)[0]
    consumer.close()


def test_q4_k_m_has_the_types_of_llama_cpps_recipe(job, reference, folder, tmp_path):
    from gguf import GGUFReader

    job.settings = dataclasses.replace(job.settings, gguf="q4_k_m")
    quantize(folder / "model.gguf", tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q6_K"  # it is the output layer too
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.3.attn_v.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q5_0"  # its rows are no multiple of 256
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    figures = proven(job, reference, "gguf", tmp_path)
    assert 0.0005 < figures.mean_kl < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_the_command_writes_gguf_files_of_every_type(job, tmp_path, kind):
    out = tmp_path / "out"
    done = command(
        "intern.export",
        f"run_dir={job.run.path}",
        "format=gguf",
        f"gguf={kind}",
        f"out={out}",
        "prompts=3",
        "max_new_tokens=8",
    )
    assert "mean KL divergence" in done.stderr
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["proven"] is True


def parsed(text):
    """A Modelfile's instructions; those of PARAMETER by their names."""
    found = {}
    for name, quoted, plain in re.findall(r'^(\w+) (?:"""(.*?)"""|([^\n]*))$', text, re.MULTILINE | re.DOTALL):
        value = quoted or plain
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        found.setdefault(name, []).append(value.strip('"') if name == "stop" else value)
    return found


def test_a_modelfile_renders_what_was_trained(job, reference, folder):
    found = parsed((folder / "Modelfile").read_text(encoding="utf-8"))
    assert found["FROM"] == ["./model.gguf"]
    assert found["stop"] == ["<|eot_id|>"]
    assert found["SYSTEM"] == [job.prompt.system_prompt]
    for prompt in reference.prompts:
        [template] = found["TEMPLATE"]
        with_system = re.sub(r"{{ if \.System }}(.*?){{ else }}.*?{{ end }}", r"\1", template, flags=re.DOTALL)
        rendered = with_system.replace("{{ .System }}", found["SYSTEM"][0])
        rendered = rendered.replace("{{ .Prompt }}", prompt.messages[-1]["content"]).split("{{ .Response }}")[0]
        assert job.tokenizer(rendered)["input_ids"] == prompt.ids


def test_a_prompt_that_a_modelfile_would_change_is_refused(job):
    prompt = dataclasses.replace(job.prompt, system_prompt='Say """ and {{ .Prompt }}.')
    with pytest.raises(UserError, match="a Modelfile cannot hold"):
        ollama.modelfile(prompt, job.tokenizer, 1024)


def test_arguments_of_a_template_become_a_part_of_it(job):
    from jinja2 import Template

    text = with_arguments("{{ thinks }}|{{ tools[0] }}|{{ none is none }}", {"thinks": False, "tools": ['a "b"', None]})
    assert Template(text).render(thinks=True) == 'False|a "b"|True'
    with pytest.raises(UserError, match="must be names of variables"):
        with_arguments("", {"x -%}{% endset": 1})


# --- servers of other programs


@pytest.fixture(scope="module")
def server(folder):
    server = LlamaServer(folder / "model.gguf")
    yield str(server._server.listening_address) + "/v1"
    server.close()


def test_an_export_is_proven_through_an_openai_server(reference, server):
    figures = ask_server(reference, server, "intern")
    assert served_faults(figures, is_close=True) == []
    assert figures["answers_equal"] >= 4


def test_a_server_with_another_model_or_without_stop_tokens_is_found(reference, server):
    others = dataclasses.replace(reference, answers=[one._replace(text=f"not {one.text}") for one in reference.answers])
    assert "answers: 0 of 6 are equal" in served_faults(ask_server(others, server, "intern"), is_close=True)[0]
    cut = dataclasses.replace(
        reference, most=1, answers=[one._replace(text="", ended=True) for one in reference.answers]
    )
    assert "stop tokens: 0 of 6" in served_faults(ask_server(cut, server, "intern"), is_close=False)[0]
    with pytest.raises(RunError, match="cannot be reached"):
        ask_server(reference, "http://127.0.0.1:9/v1", "intern")


# --- card, folder and hub


@pytest.fixture
def exported(job, tmp_path):
    """An adapter export as it lands, without its proof's figures measured again."""
    job.settings = dataclasses.replace(job.settings, license="apache-2.0")
    out = tmp_path / "export"
    out.mkdir()
    write_adapter(job, out)
    record = _record(job, "adapter", FORMATS["adapter"], None) | {"figures": FIGURES, "proven": True}
    _write_card(job, FORMATS["adapter"], out, record)
    return Export(out, sizes_of(out), record)


FIGURES = {
    **{"consumer": "peft", "prompts": 6, "positions": 90, "mean_kl": 0.0, "p99_kl": 0.0, "top1_agreement": 1.0},
    **{"answers_equal": 6, "reference_stops": 6, "stops": 6, "templates_equal": 6, "runs_on": 0},
}


def test_the_card_has_valid_metadata_and_says_what_matters(exported, job):
    card = ModelCard.load(exported.folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert yaml.safe_load(card.data.to_yaml())["pipeline_tag"] == "text-generation"
    for part in ("SHA-256", "optimizer steps", "equal greedy answers", job.prompt.system_prompt, "BitsAndBytesConfig("):
        assert part in card.text
    assert "(2." in card.text or " to " in card.text  # an interval
    assert str(job.run.path) not in card.text
    assert open_export(exported.folder, job.run).record["figures"] == FIGURES


def test_an_export_whose_program_is_missing_says_so_and_how_to_prove_it(job, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    assert gguf.consumer(job, tmp_path) is None
    _write_card(job, FORMATS["gguf"], tmp_path, _record(job, "gguf", FORMATS["gguf"], None))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "**Not proven**" in text
    assert "llama-server -m ./model.gguf" in text
    assert "python -m intern.export run_dir=RUN prove=. server=http://localhost:8000/v1" in text


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    with pytest.raises(RunError, match="broken"), landing(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise RunError("broken")
    assert list(tmp_path.iterdir()) == []
    with landing(tmp_path / "out") as draft:
        (draft / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(UserError, match="is not empty"), landing(tmp_path / "out"):
        pass


class Api:
    """huggingface_hub.HfApi's methods that an upload calls."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **more):
        self.calls.append(("create", repo_id, more["private"]))

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, sorted(allow_patterns)))
        return f"https://hub/{repo_id}/commit/1"


def test_an_export_is_uploaded_to_a_private_repository_after_its_card_was_validated(exported, monkeypatch):
    validated = []
    monkeypatch.setattr(hub.ModelCard, "validate", lambda self, *_: validated.append(self.data.license))
    api = Api()
    assert hub.upload(exported, "me/mine", True, api).endswith("/commit/1")
    assert validated == ["apache-2.0"]
    assert api.calls == [("create", "me/mine", True), ("upload", "me/mine", sorted(exported.sizes))]


@pytest.mark.parametrize("name", ["train.jsonl", ".env", "optimizer.pt", "sub/model.safetensors"])
def test_files_that_no_export_writes_are_not_uploaded(exported, name):
    hub.check_files(exported)
    (exported.folder / name).parent.mkdir(exist_ok=True)
    (exported.folder / name).write_text("x")
    with pytest.raises(UserError, match=re.escape(f"{name}: is not a file that an export writes")):
        hub.check_files(dataclasses.replace(exported, sizes=sizes_of(exported.folder)))


def test_credentials_unproven_exports_and_unknown_licences_are_not_uploaded(exported, job):
    unproven = dataclasses.replace(exported, record=exported.record | {"figures": None})
    with pytest.raises(UserError, match="is not proven"):
        hub.check_files(unproven)
    job.settings = dataclasses.replace(job.settings, license=None)
    _write_card(job, FORMATS["adapter"], exported.folder, exported.record)
    with pytest.raises(UserError, match="license: the base's own files name no licence"):
        hub.upload(exported, "me/mine", True, Api())
    with (exported.folder / "README.md").open("a") as file:
        file.write("key: hf_abcdefghijklmnopqrstuvwxyz012345\n")
    with pytest.raises(UserError, match=r"README\.md: holds a credential"):
        hub.check_files(exported)
