"""A person's words and paths mean their characters on every command line, and commands that are printed work when they are pasted."""

import json
import shlex

import pytest
from helpers import command, composed
from omegaconf import OmegaConf

from intern.cli.arguments import literal, text_of
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.find import resolve
from intern.train import _in_place

TEXTS = [
    "plain",
    "",
    "outputs/lr=1e-3",
    "r=8,lr=1",
    "Läufe",
    "train (1).jsonl",
    "it's.jsonl",
    "訓練 🚕.jsonl",
    "You're a helper: answer shortly.",
    "Réponds en français ; sois bref !",
    "'Uber' or 'Lyft'",
    '"Uber" or "Lyft"',
    "'",
    '"',
    "'open",
    'He said "no", then "yes".',
    "C:\\data\\new\\",
    "back\\slash \\' quote \\\"",
    "${oc.env:HOME}",
    "\\${now:%Y} \\\\${x}",
    "$HOME $(id) `id`",
    "{a: b}",
    "[not, a, list",
    "# no comment",
    "true",
    "7",
    "~nobody",
    "*?!@%^&|<>",
    "two\nlines\tand a tab",
    "  blanks around  ",
    "NULL",
    "a=b=c",
    "latest",
]
KEYS = {
    "train": ["data.system_prompt", "data.train_file", "data.eval_file", "resume", "logger.project"],
    "query": ["run_dir", "question", "context", "base_model"],
    "evaluate": ["run_dir", "against", "eval_file", "train_file", "name", "base_model"],
    "compare": ["output_dir"],
    "preview": ["html", "lengths", "data.train_file"],
    "doctor": ["run_dir", "model.pretrained_model_name_or_path"],
    "verify": ["data.system_prompt"],
    "export": ["run_dir", "out", "base_model", "base_name", "eval_file", "prove"],
}


@pytest.mark.parametrize("config", KEYS)
def test_a_text_is_taken_literally(config):
    for text in TEXTS if config in ("train", "query") else TEXTS[2::7]:
        overrides = literal([f"{key}={text}" for key in KEYS[config]])
        cfg = composed(*overrides, name=config)
        assert {OmegaConf.select(cfg, key) for key in KEYS[config]} == {text}
        assert all(text_of(one) == text or one.endswith(f"={text}") for one in overrides)


def test_null_stays_null_and_a_text_in_one_pair_of_quotes_is_hydras():
    assert composed(*literal(["question=null"]), name="query").question is None
    assert composed(*literal(["question='What, now?'"]), name="query").question == "What, now?"
    assert composed(*literal(["run_dir=7"]), name="query").run_dir == "7"


def test_several_files_stay_a_list_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert composed(*literal(["data.train_file=[a.jsonl,b.csv]"])).data.train_file == ["a.jsonl", "b.csv"]
    (tmp_path / "[a]").touch()
    assert composed(*literal(["data.train_file=[a]"])).data.train_file == "[a]"


def test_a_sweep_still_separates_values_by_commas():
    assert literal(["-m", "data.train_file=a.jsonl,b.jsonl"]) == ["-m", "data.train_file=a.jsonl,b.jsonl"]
    [_, prompt, folder] = literal(["-m", "data.system_prompt=You're here.", "hydra.sweep.dir=multi/r=1,2"])
    assert composed(prompt).data.system_prompt == "You're here." and text_of(folder) == "multi/r=1,2"


def test_dates_in_a_run_directory_stay_hydras():
    assert literal(["hydra.run.dir=out/lr=1/${now:%H}"]) == ['hydra.run.dir="out/lr=1/${now:%H}"']


def test_other_keys_keep_hydras_grammar():
    arguments = ["lora.target_modules=[q_proj,v_proj]", "+trainer.lr_scheduler_kwargs={num_cycles: 2}", "--cfg", "job"]
    assert literal(arguments) == arguments


@pytest.mark.parametrize("name", ["lr=1e-3", "r=8,lr=1", "it's (1)", "Läufe $HOME", "a 'b' \"c\"", "${now:%Y}"])
def test_the_printed_command_that_resumes_a_run_works_when_pasted(name, tmp_path):
    run = Run(tmp_path / name)
    run.path.mkdir()
    run.write_config(OmegaConf.create({"seed": 1}))
    with pytest.raises(UserError) as caught:
        resolve(str(run.path))
    printed = str(caught.value).partition("python -m intern.train ")[2]
    [argument] = shlex.split(printed)
    overrides = _in_place(literal([argument]))
    assert composed(overrides[0]).resume == str(run.path)
    assert overrides[1].startswith("hydra.run.dir=") and text_of(overrides[1]) == str(run.path)


def test_one_command_takes_another_persons_file_and_words(tmp_path):
    folder = tmp_path / "it's a folder = (1), 訓練"
    folder.mkdir()
    rows = [{"Question": f"How much is {number}?", "Answer": number} for number in range(4)]
    (folder / "mine, all.json").write_text(json.dumps(rows, indent=1))
    words = "You're a helper: answer in 'one' word, $5, ${x} = \"y\"."
    done = command(
        "intern.train",
        "experiment=tiny_cpu",
        f"data.train_file={folder}/mine, all.json",
        f"data.system_prompt={words}",
        "data.context=never",
        "logger=none",
        "trainer.max_steps=1",
        "trainer.min_steps=0",
        f"hydra.run.dir={folder}/lr=1,r=8",
    )
    run = Run(folder / "lr=1,r=8")
    assert run.read_json(run.prompt)["system_prompt"] == words
    stored = run.read_config().data
    assert (stored.train_file, stored.eval_file) == (f"{folder}/mine, all.json", None) and "sample" not in stored
    assert "mine, all.json: 4 rows, qa (question: Question, answer: Answer)" in done.stderr + done.stdout
    asked = command("intern.query", f"run_dir={run.path}", "question='Uber' or 'Lyft'?", "generation.max_new_tokens=2")
    assert asked.returncode == 0
