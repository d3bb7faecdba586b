"""Values of conf/generation mean what their names say, and a wrong one is one line before any model is loaded."""

import json
import logging

import pytest
import transformers
from helpers import composed

from intern import query_intern
from intern.data.question_history import read_history
from intern.errors import UserError
from intern.inference.answer import Intern
from intern.inference.generate import hold_back
from intern.inference.generation_values import Generation, check_generation
from intern.runs.directory import Run

QUESTION = "How much did Uber's gross bookings grow in 2024?"
SAMPLE = {"max_new_tokens": 12, "do_sample": True}


@pytest.fixture(scope="module")
def asked(trained_run):
    """Answers the question with other values of conf/generation, without loading the run again."""
    intern = Intern(Run(trained_run), {"max_new_tokens": 12})

    def answer(question=QUESTION, context=None, history=None, stream=False, **values):
        generation = check_generation({"max_new_tokens": 12} | values)
        intern.generation = generation.config(intern.prompt, intern.tokenizer)
        if stream:
            return "".join(intern.stream(question, context, history))
        return intern.answer(question, context, history)

    answer.intern = intern
    return answer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "generation.num_beams=0: must be at least 1"),
        ({"top_p": 2} | SAMPLE, "generation.top_p=2: must be at most 1"),
        ({"do_sample": "perhaps"}, "generation.do_sample='perhaps': must be true or false"),
        ({"do_sample": "yes"}, "generation.do_sample='yes': is text"),
        ({"max_new_tokens": "many"}, "generation.max_new_tokens='many': must be a whole number"),
        ({"max_new_tokens": True}, "generation.max_new_tokens=true: must be a number, not true or false"),
        ({"max_new_tokens": None}, "generation.max_new_tokens: give the maximum number of tokens"),
        ({"temperature": float("nan")} | SAMPLE, "generation.temperature=nan: must be a finite number"),
        ({"temperature": -1} | SAMPLE, "generation.temperature=-1: must be at least 0"),
        ({"temperature": 0.7}, "generation.temperature=0.7: has no effect without generation.do_sample=true"),
        ({"length_penalty": 2}, "generation.length_penalty=2.0: has no effect without generation.num_beams"),
        ({"num_return_sequences": 3} | SAMPLE, "generation.num_return_sequences=3: a question gets one answer"),
        ({"min_new_tokens": 20}, "generation.min_new_tokens=20 is above generation.max_new_tokens=12"),
        ({"repetition_penalty": 0}, "generation.repetition_penalty=0: must be at least 0.01"),
        ({"stop_strings": []}, "generation.stop_strings=[]: must be text, or must not be empty"),
        ({"stop_strings": [""]}, "generation.stop_strings=['']: must be text, or must not be empty"),
        ({"temprature": 1}, "generation.temprature: unknown key; did you mean generation.temperature?"),
        ({"max_tokens": 1}, "generation.max_tokens: unknown key; did you mean generation.max_new_tokens?"),
        ({"max_length": 30}, "generation.max_length: cannot be set here; set generation.max_new_tokens"),
        ({"return_dict_in_generate": True}, "generation.return_dict_in_generate: cannot be set here"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(values, message):
    with pytest.raises(UserError) as caught:
        check_generation({"max_new_tokens": 12} | values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_supported_key_is_one_of_the_library():
    assert set(vars(Generation(1))) <= set(transformers.GenerationConfig().to_dict())


def test_a_group_that_is_a_number_is_named():
    with pytest.raises(UserError, match="generation=5: must name one of the options"):
        check_generation(5)


@pytest.mark.parametrize("values", [{"max_new_tokens": 1024}, {"suppress_tokens": [99_999]}])
def test_what_the_model_cannot_do_is_refused_before_its_weights_load(trained_run, monkeypatch, values):
    monkeypatch.setattr("intern.model.base.Base.load", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=rf"generation\.{next(iter(values))}"):
        Intern(Run(trained_run), {"max_new_tokens": 12} | values)


def test_temperature_0_is_greedy_with_and_without_sampling(asked):
    greedy = asked()
    assert asked(do_sample=True, temperature=0, top_p=0.9) == asked(temperature=0) == greedy
    assert asked(do_sample=True, temperature=1e-40, top_k=3) == greedy  # logits would overflow


def test_whole_numbers_stand_for_fractions(asked):
    assert asked(repetition_penalty=1, temperature=1, top_p=1) == asked()
    assert isinstance(asked(do_sample=True, repetition_penalty=2, temperature=1, top_p=1), str)


def test_every_key_that_changes_an_answer_is_accepted_by_the_library(asked):
    assert isinstance(asked(num_beams=2, early_stopping="never", length_penalty=-1, no_repeat_ngram_size=2), str)
    more = {"top_k": 5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}
    assert isinstance(asked(do_sample=True, temperature=0.5, renormalize_logits=True, **more), str)
    words = {"bad_words_ids": [[100, 101], [102]], "sequence_bias": [[[103], 2]], "suppress_tokens": [104]}
    assert isinstance(asked(min_new_tokens=3, max_time=60, begin_suppress_tokens=[105], use_cache=False, **words), str)


def test_an_answer_ends_before_a_stop_string(asked):
    whole = asked()
    stop = whole[len(whole) // 2 :][:2]
    before = whole.partition(stop)[0].strip()
    assert before and asked(stop_strings=stop) == before == asked(stop_strings=["absent", stop])
    assert asked(stop_strings=stop, stream=True).strip() == before
    assert asked(stop_strings="訳") == whole


def test_a_stop_string_ends_only_its_own_row_and_is_not_counted(asked):
    from intern.inference.generate import generate

    intern, whole = asked.intern, asked()
    stop = whole.split()[1]
    generation = check_generation({"max_new_tokens": 12, "stop_strings": stop}).config(intern.prompt, intern.tokenizer)
    alone = [
        next(generate(intern.model, intern.tokenizer, intern.prompt, generation, [one])) for one in (QUESTION, "Why?")
    ]
    both = list(generate(intern.model, intern.tokenizer, intern.prompt, generation, [QUESTION, "Why?"]))
    assert both == alone and both[0].ended and both[0].tokens < 12


def test_streamed_text_never_shows_the_start_of_a_stop_string():
    pieces = list(hold_back(iter(["a EN", "", "B EN", "D of", " it"]), ["END"]))
    assert "".join(pieces) == "a ENB " and "a EN" not in pieces


def test_beam_search_streams_its_answer_in_one_part(asked):
    assert asked(num_beams=2, stream=True) == asked(num_beams=2)


def test_the_models_own_generation_file_changes_no_answer(asked):
    defaults = asked.intern.model.get_base_model().generation_config.to_diff_dict()
    assert not {key for key in defaults if key not in ("transformers_version", "_from_model_config")}, defaults


def test_too_many_new_tokens_are_blamed_on_their_key_and_a_long_question_on_itself(asked):
    with pytest.raises(UserError, match=r"generation\.max_new_tokens=1000 leaves 24 of the model's 1,024 positions"):
        asked(max_new_tokens=1000)
    with pytest.raises(UserError, match="question is too long for the model"):
        asked("word " * 2000)


def test_a_context_that_is_cut_is_reported_once_with_how_much(asked, caplog):
    import dataclasses

    intern = asked.intern
    before, intern.prompt = intern.prompt, dataclasses.replace(intern.prompt, context="mixed")
    try:
        with caplog.at_level(logging.WARNING):
            asked(context="Rides rose. " * 10_000)
    finally:
        intern.prompt = before
    [record] = [record for record in caplog.records if "cut" in record.message]
    tokens = int(record.message.split("last ")[1].split()[0].replace(",", ""))
    assert tokens > 25_000


# --- What was said before ---


def test_a_history_is_a_file_or_a_list_of_messages_or_pairs(tmp_path):
    pairs = [("Hi", "Hello"), ("Who?", "Me")]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    messages += [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me"}]
    (tmp_path / "list.json").write_text(json.dumps(messages, indent=2))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": messages}))
    for given in (pairs, messages, *tmp_path.iterdir()):
        assert list(read_history(given).turns) == pairs
    assert read_history([{"role": "system", "content": "S"}, *messages]).system == "S"
    assert read_history(None) == read_history([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.json", "history=nowhere.json: no such file"),
        (7, "history=7: must be a JSON or JSON Lines file"),
        ([{"text": "Hi"}], "history: entry 1 is neither a message"),
        (["Hi"], "history: entry 1 is neither a message"),
        ([("Hi", "")], "history: message 1 is empty"),
        ([{"role": "user", "content": "Hi"}], "history: ends with a question that has no answer"),
    ],
)
def test_a_history_that_cannot_be_read_is_one_line(given, message):
    with pytest.raises(UserError) as caught:
        read_history(given)
    assert str(caught.value).startswith(message)


def test_a_question_is_asked_after_its_history(trained_run, asked):
    history = [("Who leads Uber?", "Dara Khosrowshahi.")]
    intern = asked.intern
    [row] = intern.prompt.encode(intern.tokenizer, [QUESTION], histories=[history])
    text = intern.tokenizer.decode(row.input_ids)
    assert text.index("Dara") < text.index(QUESTION)
    assert query_intern(QUESTION, run_dir=trained_run, history=history) == asked(history=history, max_new_tokens=256)
    assert asked(history=history, max_new_tokens=64) != asked(max_new_tokens=64)


def test_groups_are_checked_as_the_command_composes_them():
    cfg = composed("generation=sample", "generation.temperature=0", name="query")
    assert not check_generation(cfg.generation).samples
