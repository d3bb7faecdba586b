"""What can stop a run shows as its line, with a remedy, and never hides the other lines."""

import importlib.metadata
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import pytest
import torch
import wandb
from helpers import ROOT, composed
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig

import intern.training.finetune  # noqa: F401  # loads every library before a test puts a GPU in front of them
from intern import doctor as command
from intern.cards import find_card
from intern.errors import UserError
from intern.hardware import available_memory, runs_architectures
from intern.inspection.check import AMBER, GREEN, RED
from intern.inspection.doctor import CHECKS, diagnose, plan_for_card, run_check
from intern.inspection.doctor_pieces import DoctorPieces
from intern.inspection.installation import missing_weights, requirements
from intern.memory.estimate import ModelSizes, training_peak
from intern.units import GIB

TINY = "experiment=tiny_cpu"
LLAMA = ("model=llama3_8b", "quant=nf4_fp16")
NO_NETWORK = urllib.error.URLError("Name or service not known")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def checks(*overrides):
    """Every check by its name."""
    found = {check.name: check for check in diagnose(composed(*overrides, name="doctor"))}
    assert list(found) == list(CHECKS)  # every check has its line, whatever happens
    return found


def line(name, *overrides):
    """One check alone."""
    return run_check(name, CHECKS[name], DoctorPieces(composed(*overrides, name="doctor")))


def red(found):
    return {name for name, check in found.items() if check.status == RED}


def exit_code(*arguments):
    """What the command's process would end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["doctor", *map(str, arguments)])
        try:
            command.main()
        except SystemExit as end:
            return end.code
    return 0


def test_the_tiny_run_can_run_here(capsys):
    found = checks(TINY)
    assert not red(found)
    assert "3.6 million parameters" in found["model"].found
    assert "1,166 valid rows, all fit" in found["training rows"].found
    assert found["host memory"].status == GREEN and "GiB needed" in found["host memory"].found
    capsys.readouterr()
    assert exit_code(TINY) == 0
    said = capsys.readouterr()
    assert said.out.startswith("| check | status | found | remedy |\n") and not said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_model_that_needs_a_gpu_is_red_without_one(capsys):
    assert exit_code(*LLAMA, "format=json") == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["schema_version"] == 1 and told["verdict"] == RED
    lines = {line["name"]: line for line in told["checks"]}
    assert all(line.keys() == {"name", "status", "found", "remedy"} for line in lines.values())
    assert lines["GPU"]["status"] == RED and "experiment=tiny_cpu" in lines["GPU"]["remedy"]
    assert (lines["precision"]["status"], lines["precision"]["remedy"]) == (AMBER, "fix GPU first")
    # The data do not need the model to be looked at.
    assert "1,166 valid rows; their tokens were not counted" in lines["training rows"]["found"]
    assert "checks red: GPU, model" in said.err


def test_an_unknown_format_is_bad_input(capsys):
    assert exit_code(TINY, "format=xml") == 2
    assert "format=xml: must be table or json" in capsys.readouterr().err


@pytest.mark.parametrize("found", ["1.17.0", None])
def test_a_library_outside_its_range_is_named(monkeypatch, found):
    real = importlib.metadata.version

    def version(name):
        if name != "trl":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = line("libraries", TINY)
    assert told.status == RED and f"trl {found or 'missing'} (supported: <1.17,>=1.16)" in told.found
    assert told.remedy == "pip install 'trl<1.17,>=1.16'"


def test_the_supported_ranges_are_the_projects_own():
    python, wanted = requirements()
    names = {one.name for one in wanted if one.marker is None}
    assert python == ">=3.11" and {"torch", "trl", "peft", "bitsandbytes", "packaging", "psutil"} <= names
    assert [one.name for one in wanted if one.marker is not None and "gpu" in str(one.marker)] == [
        "liger-kernel",
        "nvidia-cudnn-frontend",
    ]


def test_an_old_python_is_red(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.2")
    found = line("Python", TINY)
    assert found.status == RED and found.found == "3.10.2, but >=3.11 is required" and "3.11" in found.remedy


def test_a_full_disk_is_red(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    found = line("disk", TINY)
    assert found.status == RED and found.found.endswith("; 1 MiB free") and "HF_HOME" in found.remedy


def test_a_folder_that_cannot_be_written_is_red(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch(0o444)  # below a file nothing can be written, by nobody
    found = line("run directory", TINY, f"run_dir={blocked}/runs")
    assert found.status == RED and "hydra.run.dir" in found.remedy


def test_a_check_that_fails_itself_is_red_and_hides_no_other(monkeypatch):
    def broken():
        raise OSError("no /proc here")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    found = checks(TINY)
    assert red(found) == {"host memory"}
    assert found["host memory"].found == "OSError: no /proc here" and found["host memory"].remedy


@pytest.mark.parametrize(
    ("overrides", "name", "found", "remedy"),
    [
        (["+lora.rank=8"], "configuration", "lora.rank", "unknown key"),
        (["lora.r=abc"], "configuration", "lora.r='abc'", "must be a whole number"),
        (["trainer.max_steps=5"], "configuration", "trainer.max_steps=5 is below", "set trainer.min_steps=5 too"),
        (["+logger.mod=offline"], "configuration", "logger.mod", "did you mean logger.mode?"),
        (["lora.target_modules=[query]"], "adapter", "lora.target_modules", "the model has no query"),
        (["trainer.max_length=4096"], "model", "trainer.max_length=4096: the model has 1,024 positions", "lower it to 1024"),
        (["data.train_file=none.jsonl"], "training rows", "data.train_file=none.jsonl", "no such file"),
        (["data.context=sometimes"], "tokenizer", "data.context=sometimes", "must be auto or one of never, always, mixed"),
        (["model.pretrained_model_name_or_path=./none"], "model", "./none", "no such folder"),
        (["quant.bnb_4bit_compute_dtype=float16"], "precision", "would train without loss scaling", "set it to float32"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line_and_remedy(overrides, name, found, remedy):
    told = line(name, TINY, *overrides)
    assert told.status == RED and found in told.found and remedy in told.remedy, told


def test_a_mistake_in_one_group_hides_no_other_line():
    found = checks(TINY, "+lora.rank=8", "data.train_file=none.jsonl", "+logger.mod=offline")
    assert red(found) == {"configuration", "adapter", "training rows"}
    assert found["W&B"].remedy == "fix configuration first"
    assert all(check.remedy for check in found.values() if check.status != GREEN)


def test_a_bad_row_is_named(rows_file):
    path = rows_file({"question": "q", "answer": "a", "chunk_text": "c"}, "{")
    found = line("training rows", TINY, f"data.train_file={path}")
    assert found.status == RED and f"{path}:2: not JSON" in found.found


def test_rows_that_do_not_fit_are_amber(rows_file):
    path = rows_file(*({"question": "q", "answer": answer, "chunk_text": "c"} for answer in ("a", "word " * 2000)))
    found = line("golden rows", TINY, f"data.eval_file={path}")
    assert found.status == AMBER and "2 valid rows, 1 dropped" in found.found


def test_no_golden_rows_are_amber():
    assert line("golden rows", TINY, "data.eval_file=null").status == AMBER


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_folder_without_its_weights_is_red(tmp_path, shards):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny_llama3", base)
    (base / "model.safetensors").unlink()
    if shards:
        files = [f"model-{number}.safetensors" for number in (1, 2)]
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(files))}))
        for file in files[:shards]:
            shutil.copy(ROOT / "data/tiny_llama3/model.safetensors", base / file)
    found = line("weights", TINY, f"model.pretrained_model_name_or_path={base}")
    assert found.status == (GREEN if shards == 2 else RED)
    assert ("model.safetensors missing", "model-2.safetensors missing", "present")[shards] in found.found


def test_weights_that_were_cut_short_are_red(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny_llama3", base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = line("weights", TINY, f"model.pretrained_model_name_or_path={base}")
    assert found.status == RED and "model.safetensors missing or truncated" in found.found


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def refuse(url, timeout):
        asked.append(url)
        raise NO_NETWORK

    fetch, offline = AutoConfig.from_pretrained, []

    def note(*arguments, **others):
        offline.append(constants.HF_HUB_OFFLINE)
        return fetch(*arguments, **others)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(AutoConfig, "from_pretrained", note)
    found = checks(*LLAMA)
    assert asked == [constants.ENDPOINT]
    assert offline == [True]  # the library was asked once, and not left to try the network again and again
    assert found["hub"].status == AMBER and "does not answer" in found["hub"].found
    assert found["model"].status == RED and "not in the local cache" in found["model"].found
    assert constants.HF_HUB_OFFLINE is False  # given back


def test_weights_on_the_hub_are_counted_and_a_gated_model_is_named(monkeypatch):
    files = {"model-00001-of-00002.safetensors": 5 * GIB, "model-00002-of-00002.safetensors": GIB, "original/model.safetensors": GIB, "pytorch_model.bin": GIB}  # fmt: skip
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "auth_check", lambda self, name: None)
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **others: SimpleNamespace(siblings=siblings))
    assert missing_weights("someone/something-that-is-not-cached", "main") == 6 * GIB
    siblings[:2] = []
    with pytest.raises(UserError, match="has no safetensors weights: use another copy"):
        missing_weights("someone/something-that-is-not-cached", "main")

    def refuse(self, name):
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    with pytest.raises(UserError, match="gated: accept its license on its page, then run `hf auth login`"):
        missing_weights("someone/something-that-is-not-cached", "main")


@pytest.mark.parametrize(
    ("mode", "key", "answers", "status", "found"),
    [
        ("null", False, False, GREEN, "no API key: the run is logged offline"),
        ("online", False, False, RED, "there is no API key"),
        ("null", True, True, GREEN, "answers"),
        ("null", True, False, AMBER, "does not answer"),
        ("online", True, False, RED, "does not answer"),
        ("offline", True, False, GREEN, "offline"),
    ],
)
def test_what_the_tracker_needs(monkeypatch, mode, key, answers, status, found):
    def urlopen(url, timeout):
        if not answers:
            raise NO_NETWORK
        raise urllib.error.HTTPError(url, 404, "an answer all the same", {}, None)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: key)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    told = line("W&B", TINY, f"logger.mode={mode}")
    assert told.status == status and found in told.found
    assert line("W&B", TINY, "logger=none").found == "off (logger=none)"


@pytest.fixture
def card(monkeypatch):
    """A GPU as torch tells of it."""

    def put(name="Tesla T4", capability=(7, 5), gib=14.6, built=("sm_75", "sm_80", "sm_90", "compute_90"), bf16=False):
        answers = {
            "is_available": True, "init": None, "set_device": None, "device_count": 1, "get_device_name": name, "get_device_capability": capability,
            "get_arch_list": list(built), "is_bf16_supported": bf16, "mem_get_info": (int(gib * GIB), int(gib * GIB)),
            "memory_reserved": 0, "memory_allocated": 0, "get_per_process_memory_fraction": 1.0,
            "get_device_properties": SimpleNamespace(total_memory=int(gib * GIB)),
        }  # fmt: skip
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *args, answer=answer, **others: answer)

    return put


GPU_RUN = ("model=tiny", "trainer=t4_min100")


def test_a_t4_is_seen_as_it_is(card):
    card()
    found = checks(*GPU_RUN)
    assert found["GPU"].status == GREEN and "Tesla T4, compute capability 7.5" in found["GPU"].found
    assert found["precision"].status == GREEN and "fp16 with loss scaling" in found["precision"].found
    assert found["GPU memory"].status == GREEN and "14.6 free" in found["GPU memory"].found
    bf16 = line("precision", "model=tiny", "trainer=ampere", "quant=nf4_bf16")
    assert bf16.status == RED and "has no bfloat16" in bf16.found and "quant=nf4_fp16" in bf16.remedy


def test_a_newer_card_is_told_of_bfloat16(card):
    card("A100", (8, 0), 39.4, bf16=True)
    found = line("precision", *GPU_RUN)
    assert found.status == AMBER and "trainer=ampere quant=nf4_bf16" in found.remedy


def test_a_run_is_planned_for_another_card_than_the_one_that_is_here(card, monkeypatch):
    card("A100", (8, 0), 39.4, bf16=True)

    def asked(*_, **__):
        raise AssertionError("this machine's GPU does not count")

    for name in ("get_device_name", "get_device_capability", "mem_get_info", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, asked)
    cfg = composed(*GPU_RUN, "gpu=t4", "data.max_rows=40", name="doctor")
    found, run = plan_for_card(cfg, find_card("t4"))
    told = {check.name: check for check in found}
    assert run is not None and run.is_enough and "NVIDIA T4" in told["GPU"].found
    assert told["precision"].status == GREEN and "of 14.6" in told["GPU memory"].found
    assert not red(told) and "A100" not in "".join(check.found for check in found)


def test_a_card_that_torch_has_no_kernels_for_is_red(card):
    card("GTX 1080", (6, 1))
    found = line("GPU", *GPU_RUN)
    assert found.status == RED and "sm_75" in found.found


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), ["sm_75"], True),
        ((7, 0), ["sm_75"], False),
        ((8, 9), ["sm_75", "sm_86"], True),
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["sm_86", "compute_86"], True),
        ((12, 0), ["sm_90a", "sm_100", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_which_kernels_a_card_can_run(capability, built, runs):
    assert runs_architectures(*capability, built) is runs


def test_too_little_gpu_memory_is_red_and_tight_is_amber(card):
    card(gib=0.4)
    needed = line("GPU memory", *GPU_RUN)
    assert needed.status in (GREEN, AMBER)
    card(gib=0.2)
    found = line("GPU memory", *GPU_RUN)
    assert found.status == RED and "lower trainer.per_device_train_batch_size" in found.remedy
    need = float(needed.found.split()[1])
    card(gib=need * 1.05)
    assert line("GPU memory", *GPU_RUN).status == AMBER


@pytest.mark.parametrize(
    ("tokens", "fused", "kind", "measured"),
    [
        (2048, True, "recomputed", 6.36),
        (2048, True, "kept", 12.70),
        (1024, True, "kept", 9.20),
        (16384, True, "recomputed", 12.0),
        (16384, True, "kept", 56.3),
        (16384, False, "kept", 78.8),
    ],
)
def test_the_estimate_is_near_what_was_measured(tokens, fused, kind, measured):
    llama3_8b = ModelSizes(32, 4096, 14336, 1024, weights=5.31 * GIB, trainable=13_631_488, adapted_inputs=4 * 4096)
    peak = training_peak(llama3_8b, tokens, element=2, fused=fused, state_bytes=2)
    assert getattr(peak, kind) / GIB == pytest.approx(measured, rel=0.1)


def test_a_containers_memory_limit_counts(tmp_path):
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 2000


def test_doctor_composes_the_groups_of_train():
    assert composed(name="doctor").keys() - composed().keys() == {
        "format",
        "run_dir",
        "gpu",
        "price_per_hour",
    }


def test_no_path_of_this_machine_is_shown_for_what_the_project_ships():
    assert str(Path(ROOT)) not in "".join(check.found for check in checks(TINY).values())
