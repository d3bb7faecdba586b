"""conf/data -> rows: nothing of the sample with one's own file, several files, mixtures, held-out documents, the hub, caches."""

import json
import os
import subprocess
import sys

import datasets
import pytest
from helpers import ROOT, composed
from omegaconf import OmegaConf

from intern.config.build import build, plain
from intern.data.files import DataFile, read_rows
from intern.data.prepare import golden_rows, located, training_rows
from intern.data.prompt import Prompt
from intern.data.settings import DataConfig, with_defaults
from intern.data.split import hold_out
from intern.data.tokenize import tokenize
from intern.errors import UserError
from intern.model.base import Base


def qa(number, **others):
    return {"question": f"How much is {number}?", "answer": str(number)} | others


def configured(*overrides):
    return located(build(DataConfig, plain(composed(*overrides).data), "data"))


# --- whose data it is ---


def test_the_bare_command_has_the_sample_with_its_golden_file_and_system_prompt():
    found = configured()
    assert found.data.system_prompt.startswith("You are the Intern") and found.data.evaluates
    assert [source.name for source in found.golden] == ["data/golden_test_set.jsonl"]


def test_ones_own_file_gets_nothing_of_the_sample(rows_file, monkeypatch, tmp_path):
    path = rows_file(qa(1))
    assert (configured(f"data.train_file={path}").data.system_prompt, configured(f"data.train_file={path}").golden) == (
        "",
        [],
    )
    own = tmp_path / "data"
    own.mkdir()
    (own / "train.jsonl").write_text(json.dumps(qa(1)))
    monkeypatch.chdir(tmp_path)  # a file of the same name in the user's own folder
    assert (configured().data.system_prompt, configured().golden) == ("", [])


def test_the_context_mode_of_an_experiment_is_the_samples_and_not_that_of_ones_own_file(rows_file):
    assert configured().data.context == "never"
    assert configured("experiment=tiny_cpu").data.context == "mixed"
    own = f"data.train_file={rows_file(qa(1))}"  # has no context, as most people's rows
    assert configured("experiment=tiny_cpu", own).data.context == "never"
    assert configured("experiment=tiny_cpu", own, "data.context=always").data.context == "always"


def test_what_is_given_is_taken_with_ones_own_file_and_with_the_sample(rows_file):
    path, golden = rows_file(qa(1)), rows_file(qa(2), name="golden.jsonl")
    found = configured(f"data.train_file={path}", f"data.eval_file={golden}", "data.system_prompt=Hi.")
    assert (found.data.system_prompt, found.golden[0].file.path) == ("Hi.", golden)
    found = configured("data.eval_file=null", "data.system_prompt=''")
    assert (found.data.system_prompt, found.golden) == ("", [])


def test_a_run_stores_explicit_values_that_mean_the_same_later(rows_file, prepared):
    done = prepared(rows_file(qa(1)), system_prompt="auto")
    where = str(done.train.files[0].path)
    assert done.values == {"train_file": where, "eval_file": None, "context": "never", "system_prompt": ""}
    stored = with_defaults(
        {"train_file": "a", "eval_file": None, "context": "never", "num_proc": None, "system_prompt": ""}
    )
    assert stored["loss_on"] == "all" and stored["eval_share"] == 0 and "sample" not in stored


# --- which files ---


def test_several_files_and_globs_are_read_in_order_and_each_row_knows_its_file(tmp_path, prepared, monkeypatch):
    for name, count in (("b.jsonl", 2), ("a.jsonl", 3)):
        (tmp_path / name).write_text("\n" + "".join(json.dumps(qa(f"{name} {row}")) + "\n" for row in range(count)))
    (tmp_path / "c.csv").write_text("question,answer\nq,a\n")
    monkeypatch.chdir(tmp_path)
    done = prepared("*.jsonl", "c.csv")
    places = [done.train.place(row) for row in done.train.rows["row"]]
    assert places == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.jsonl:2", "b.jsonl:3", "c.csv:2"]
    assert done.values["train_file"] == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv")]
    assert [file.path.name for file in done.files] == ["a.jsonl", "b.jsonl", "c.csv"] and done.train.name == "3 files"
    assert list(done.train_tokens.origins["row"]) == list(done.train.rows["row"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.nothing", "data.train_file=.*: no file matches"),
        ("owner/name", "no such file.*; a dataset of the hub is named hub:owner/name"),
        ("hub:a/b/c", "a dataset of the hub is named hub:owner/name"),
        ("hub:owner/name", "hub:owner/name: cannot be loaded .*data.split=train"),
        ([], "at least one file"),
    ],
)
def test_a_name_that_names_nothing_is_refused(name, message, prepared):
    with pytest.raises(UserError, match=message) as caught:
        prepared(*([name] if name else []))
    assert "\n" not in str(caught.value)


def test_a_mixture_has_its_weights_no_row_twice_and_the_same_rows_every_time(rows_file, prepared):
    one = rows_file(*map(qa, range(100)), name="one.jsonl")
    two = rows_file(*map(qa, range(100, 130)), name="two.jsonl")
    numbers = {}
    for seed in (1, 1, 2):
        done = prepared(one, two, weights=[2, 1], seed=seed)
        answers = [int(answer) for answer in done.train.rows["answer"]]
        assert (sum(a < 100 for a in answers), sum(a >= 100 for a in answers), len(set(answers))) == (60, 30, 90)
        assert numbers.setdefault(seed, answers) == answers and answers == sorted(answers)
    assert numbers[1] != numbers[2]
    with pytest.raises(UserError, match=r"data.weights=\[1\]: must have one weight per entry"):
        prepared(one, two, weights=[1])
    with pytest.raises(UserError, match="each must be above 0"):
        prepared(one, two, weights=[1, 0])


def test_a_weighted_glob_is_stored_as_the_entry_that_it_is(tmp_path, prepared, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(qa(name)))
    (tmp_path / "c.csv").write_text("question,answer\nq,a\n")
    monkeypatch.chdir(tmp_path)
    done = prepared("*.jsonl", "c.csv", weights=[2, 1])
    stored = done.values["train_file"]
    assert stored == [str(tmp_path / "*.jsonl"), str(tmp_path / "c.csv")]
    monkeypatch.chdir("/")
    again = prepared(*stored, weights=[2, 1])
    assert list(again.train.rows["row"]) == list(done.train.rows["row"])


def test_max_rows_takes_the_first_rows(rows_file, prepared):
    done = prepared(rows_file(*map(qa, range(9))), max_rows=4, eval_share=0.5)
    assert len(done.train.rows) + len(done.golden.rows) == 4


# --- the hub, by way of folders ---


@pytest.mark.parametrize("saved", ["parquet", "saved", "splits"])
def test_a_dataset_folder_is_read_by_the_library(saved, tmp_path, prepared):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]
    rows = datasets.Dataset.from_list([{"conversations": talk, "id": number} for number in range(5)])
    folder = tmp_path / "own"
    if saved == "parquet":
        (folder / "data").mkdir(parents=True)
        rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    elif saved == "saved":
        rows.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    done = prepared(folder, eval_file=str(folder) if saved == "splits" else None)
    assert done.train.formats == ("sharegpt (conversations)",) and list(done.train.rows["row"]) == [1, 2, 3, 4, 5]
    assert saved != "splits" or len(done.golden.rows) == 2
    assert sorted(path.name for path in folder.rglob("*")) == before  # nothing is written into it
    assert prepared(folder, eval_file=None).files[0].sha256 == done.files[0].sha256


def test_streaming_takes_the_first_rows_only(tmp_path, prepared):
    folder = tmp_path / "own"
    folder.mkdir()
    datasets.Dataset.from_list([qa(number) for number in range(50)]).to_parquet(folder / "train.parquet")
    done = prepared(folder, streaming=True, max_rows=7)
    assert list(done.train.rows["answer"]) == list("0123456")
    with pytest.raises(UserError, match="data.streaming=true needs data.max_rows"):
        prepared(folder, streaming=True)
    with pytest.raises(UserError, match="cannot be loaded .*Bad split: nope.*data.split=nope"):
        prepared(folder, split="nope", streaming=True, max_rows=7)
    with pytest.raises(UserError, match="has no file of the split nope, but of train: set data.split"):
        prepared(folder, split="nope")


def test_a_bad_row_of_a_dataset_is_named(tmp_path, prepared):
    folder = tmp_path / "own"
    folder.mkdir()
    datasets.Dataset.from_list([qa(1), qa(2) | {"answer": " "}]).to_parquet(folder / "train.parquet")
    with pytest.raises(UserError, match="train.parquet: row 2: field 'answer' is empty"):
        prepared(folder)
    with pytest.raises(UserError, match=f"{folder}: row 2: field 'answer' is empty"):
        prepared(folder, streaming=True, max_rows=2)


def test_a_folder_of_tables_is_read_like_its_files(tmp_path, prepared):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.csv").write_text("question;answer\nHow much?;18\n", encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps(qa(2)) + "\n")
    done = prepared(folder, eval_file=str(folder))
    assert (
        list(done.train.rows["answer"]) == ["18", "2"] and done.train.name == "2 files" and len(done.golden.rows) == 2
    )
    (folder / "test.csv").write_text("question;answer\nGolden?;yes\n", encoding="utf-8")
    for name in ("a.csv", "b.jsonl"):
        (folder / name).rename(folder / f"train-{name}")
    done = prepared(folder, eval_file=str(folder))
    assert len(done.train.rows) == 2 and list(done.golden.rows["answer"]) == ["yes"]


# --- held-out rows ---


def rows_of(rows_file, *rows):
    return read_rows(DataFile.find(str(rows_file(*rows)), "data.train_file"), needs_material=False)


def test_held_out_documents_share_nothing_with_training(rows_file):
    # Rows 3n and 3n + 1 share a key, 3n + 1 and 3n + 2 a text: all three are one document.
    rows = [
        qa(number, chunk_id=f"doc {number // 3}" if number % 3 < 2 else None, chunk_text=f"TEXT  {number // 3}" if number % 3 else None)
        for number in range(300)
    ]  # fmt: skip
    train, golden = hold_out(rows_of(rows_file, *rows), 0.1, seed=1)
    assert len(train) + len(golden) == 300 and len(golden) == 30
    documents = [{int(answer) // 3 for answer in part["answer"]} for part in (train, golden)]
    assert not documents[0] & documents[1]
    assert list(golden["row"]) == sorted(golden["row"])
    again = hold_out(rows_of(rows_file, *rows), 0.1, seed=1)[1]
    other = hold_out(rows_of(rows_file, *rows), 0.1, seed=2)[1]
    assert list(again["row"]) == list(golden["row"]) != list(other["row"])


def test_rows_of_no_document_are_held_out_by_their_question(rows_file):
    rows = [
        qa(number // 2) | {"question": f"{'HOW ' if number % 2 else 'how  '}much is {number // 2}?"}
        for number in range(80)
    ]
    train, golden = hold_out(rows_of(rows_file, *rows), 0.25, seed=1)
    assert len(golden) == 20 and not set(train["answer"]) & set(golden["answer"])


def test_one_document_cannot_be_held_out(rows_file, prepared):
    with pytest.raises(UserError, match="all 3 rows belong to one document"):
        prepared(rows_file(*(qa(number, chunk_id="a") for number in range(3))), eval_share=0.5)
    with pytest.raises(UserError, match="data.eval_share=1.0: must be at least 0 and below 1"):
        prepared(rows_file(qa(1)), eval_share=1.0)
    with pytest.raises(UserError, match="data.eval_share: data.eval_file is given too"):
        prepared(rows_file(qa(1)), eval_share=0.1, eval_file="x.jsonl")


def test_a_finished_run_finds_its_held_out_rows_again(rows_file, prepared):
    done = prepared(rows_file(*map(qa, range(40))), eval_share=0.2)
    stored = json.loads(json.dumps({"context": "never", "num_proc": None, "eval_share": 0.2} | done.values))
    assert list(golden_rows(stored, None, False).rows["row"]) == list(done.golden.rows["row"])
    trained = training_rows(stored)
    assert list(trained.rows["row"]) == list(done.train.rows["row"]) and len(trained.rows) == 32
    assert golden_rows(stored, None, False).file.sha256 not in (trained.file.sha256, done.files[0].sha256)
    assert len(golden_rows(stored, str(rows_file(qa(1), name="other.jsonl")), False).rows) == 1


# --- caches ---


def test_another_vocabulary_with_the_same_template_does_not_read_the_tokens_of_the_first(rows_file):
    one, two = (
        Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"})).tokenizer() for _ in range(2)
    )
    two.add_tokens(["much"])
    assert one.chat_template == two.chat_template
    rows = rows_of(rows_file, qa(1))
    tokens = [
        tokenize(rows, each, Prompt.from_tokenizer(each, "Be.", "never"), 128, 1).rows[0]["input_ids"]
        for each in (one, two)
    ]
    assert tokens[0] != tokens[1] and two.convert_tokens_to_ids("much") in tokens[1]


def test_another_rule_for_long_rows_does_not_read_the_tokens_of_the_first(rows_file, tokenizer, monkeypatch):
    rows = rows_of(rows_file, qa(1))
    prompt = Prompt.from_tokenizer(tokenizer, "Be.", "never")
    files = {tokenize(rows, tokenizer, prompt, 128, 1).rows.cache_files[0]["filename"] for _ in range(2)}
    monkeypatch.setattr("intern.data.tokenize.RULE", "another")
    files.add(tokenize(rows, tokenizer, prompt, 128, 1).rows.cache_files[0]["filename"])
    assert len(files) == 2


FULL = """
import resource, sys
import datasets
from intern.data.files import DataFile, read_rows
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
read_rows(DataFile.find(sys.argv[1], "data.train_file"), needs_material=False)
"""


def test_a_cache_that_is_full_or_cannot_be_made_is_one_line(rows_file, tmp_path):
    path = rows_file(*(qa(number, topic="word " * 100) for number in range(500)))
    for cache, size in ((tmp_path / "small", 2**16), (path / "not-a-folder", 2**30)):
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(path), str(cache), str(size)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"intern.errors.RunError: {cache}: the cache of rows cannot be written ("), done.stderr
        assert last.endswith("free some space, or set HF_DATASETS_CACHE to a folder elsewhere")


def test_progress_bars_are_as_before_after_reading_and_tokenizing(rows_file, prepared):
    datasets.enable_progress_bars()  # another test of this process may have routed messages, which hides them without a terminal
    prepared(rows_file(qa(1)))
    assert not datasets.are_progress_bars_disabled()
