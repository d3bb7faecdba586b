"""A finished run answers: from the command line, from Python, from anywhere."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SHORT, command

from intern import query_intern
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.inference.generate import Reply, generate
from intern.inference.generation_values import check_generation
from intern.runs.directory import Run

QUESTION = "How much did Uber's gross bookings grow in 2024?"
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def intern(trained_run):
    return Intern(Run(trained_run), GREEDY)


def test_the_command_prints_the_answer_alone(trained_run, tmp_path):
    done = command(
        "intern.query", f"run_dir={trained_run}", f"question={QUESTION}", "generation.max_new_tokens=24", cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1
    assert done.stdout.strip() == Intern(Run(trained_run), GREEDY).answer(QUESTION)
    assert list(tmp_path.iterdir()) == []


def test_a_question_with_hydras_own_signs_arrives_as_it_was_asked(trained_run):
    question = r"""What's up with "Uber One", e.g. {members=30M, fee: $9.99}, [a,b] and ${oc.env:HOME} \ or \" so?"""
    done = command("intern.query", f"run_dir={trained_run}", f"question={question}", "generation.max_new_tokens=8")
    assert done.stdout.strip() == Intern(Run(trained_run), {"max_new_tokens": 8, "do_sample": False}).answer(question)


def test_bytes_that_are_no_text_and_a_terminal_that_lacks_characters_end_in_replacement_characters(trained_run):
    line = [sys.executable, "-m", "intern.query", f"run_dir={trained_run}", "generation.max_new_tokens=8"]
    done = subprocess.run(
        [*line, b"question=\xff\xf0\x9f\x9a\x80?"], cwd=ROOT, capture_output=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout.isascii() and done.stdout.strip()


def test_text_that_is_no_text_is_refused_in_python(intern):
    with pytest.raises(UserError, match="question has a character that is no text"):
        intern.answer("\udcff?")


def test_python_asks_the_same_and_loads_once(trained_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from intern.inference import answer

    answer._loaded.cache_clear()
    first = query_intern(QUESTION, run_dir=trained_run)
    assert first == query_intern(QUESTION, run_dir=str(trained_run))
    assert answer._loaded.cache_info().misses == 1
    assert isinstance(first, str)


def test_latest_is_found_in_the_working_directory(trained_run, monkeypatch, tmp_path):
    (tmp_path / "outputs" / "today").mkdir(parents=True)
    (tmp_path / "outputs" / "today" / "run").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        query_intern(QUESTION)  # links are not followed
    (tmp_path / "outputs" / "today" / "run").unlink()
    trained_run.rename(tmp_path / "outputs" / "today" / "run")
    try:
        assert isinstance(query_intern(QUESTION), str)
    finally:
        (tmp_path / "outputs" / "today" / "run").rename(trained_run)


def test_the_adapter_is_what_answers(intern):
    with_adapter = next(generate(intern.model, intern.tokenizer, intern.prompt, intern.generation, [QUESTION]))
    with intern.model.disable_adapter():
        without = next(generate(intern.model, intern.tokenizer, intern.prompt, intern.generation, [QUESTION]))
    assert with_adapter != without


def test_an_answer_stops_at_the_end_of_turn(intern):
    """The first token of the answer is declared an end of turn: nothing may follow it."""
    [row] = intern.prompt.encode(intern.tokenizer, [QUESTION])
    logits = intern.model(torch.tensor([row.input_ids])).logits[0, -1]
    import dataclasses

    prompt = dataclasses.replace(intern.prompt, stop_ids=(int(logits.argmax()),))
    generation = check_generation(GREEDY).config(prompt, intern.tokenizer)
    assert list(generate(intern.model, intern.tokenizer, prompt, generation, [QUESTION])) == [Reply("", 0, True)]


def test_an_answer_that_is_cut_off_is_known_to_be(intern):
    generation = check_generation({"max_new_tokens": 1}).config(intern.prompt, intern.tokenizer)
    [reply] = generate(intern.model, intern.tokenizer, intern.prompt, generation, [QUESTION])
    assert reply.ended is False


def test_answers_do_not_depend_on_their_batch(intern):
    questions = [QUESTION, "Why?", "Who runs Freight, and what does the segment lose in a year of weak rates?"]
    alone = [
        next(generate(intern.model, intern.tokenizer, intern.prompt, intern.generation, [question]))
        for question in questions
    ]
    together = list(generate(intern.model, intern.tokenizer, intern.prompt, intern.generation, questions))
    assert alone == together


def test_streamed_pieces_are_the_answer(intern):
    assert "".join(intern.stream(QUESTION)).strip() == intern.answer(QUESTION)


def test_a_failure_in_the_middle_of_a_stream_reaches_the_one_who_waits(intern):
    with pytest.raises(UserError, match="question is too long for the model"):
        list(intern.stream("word " * 2000))


def test_a_chat_answers_line_by_line(trained_run):
    line = [sys.executable, "-m", "intern.query", f"run_dir={trained_run}", "generation.max_new_tokens=24"]
    done = subprocess.run(
        line, cwd=ROOT, input=f"{QUESTION}\n\n{QUESTION}\n", capture_output=True, text=True, check=True
    )
    answer = Intern(Run(trained_run), GREEDY).answer(QUESTION)
    assert done.stdout.split() == [*answer.split(), *answer.split()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run_dir=nowhere", "question=x"], "run_dir=nowhere: no such folder"),
        (["run_dir={run}", "question=' '"], "question is empty"),
        (["run_dir={run}", "question=x", "context=y"], "trained with data.context=never"),
        (["run_dir={run}", "question=x", "generation.temprature=1"], "did you mean generation.temperature?"),
        (
            ["run_dir={run}", "question=x", "+generation.max_tokens=1"],
            "generation.max_tokens: unknown key; did you mean generation.max_new_tokens?",
        ),
        (["run_dir={run}", "question=x", "generation.max_new_tokens=-3"], "max_new_tokens"),
        (
            ["run_dir={run}", "question=x", "base_model=/nowhere/at/all"],
            "model.pretrained_model_name_or_path=/nowhere/at/all: no such folder",
        ),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(trained_run, arguments, message):
    if "temprature" in arguments[-1]:
        arguments = [*arguments, "generation=sample"]
    done = command("intern.query", *(text.format(run=trained_run) for text in arguments), check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_run_with_material_answers_from_it(tmp_path):
    target = tmp_path / "run"
    command("intern.train", *SHORT, "logger=none", "data.context=always", f"hydra.run.dir={target}")
    intern = Intern(Run(target), GREEDY)
    one, other = "Gross bookings grew 18% as reported.", "Robots brought meals to 31 students in Tokyo. " * 5
    assert intern.answer(QUESTION, one) != intern.answer(QUESTION, other)


def test_a_damaged_adapter_is_named(trained_run, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(trained_run, broken)
    weights = broken / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = command("intern.query", f"run_dir={broken}", "question=x", check=False)
    assert (
        done.returncode == 2
        and f"{broken}/adapter/adapter_model.safetensors: cannot be loaded" in done.stderr
        and done.stderr.count("\n") == 1
    )
