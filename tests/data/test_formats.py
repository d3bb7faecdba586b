"""Each row format becomes the conversation that its documentation describes; a format can be added from outside."""

import importlib
import json
import sys

import pytest

from intern.data.formats import FORMATS, Conversation, Layout, RowFormat, RowSettings, Turn, conversation_row, register
from intern.errors import UserError

END = "<|eot_id|>"


def said(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}{END}"


def test_a_row_has_every_field_that_later_steps_read():
    def read(row, **settings):
        return conversation_row(Layout(FORMATS["qa"], RowSettings("qa", **settings)), row, "rows.csv:2")

    row = {
        "question": "Q?",
        "answer": "A.",
        "context": "C.",
        "document": "d",
        "topic": "t",
        "system": "S.",
        "seen_chunk": "True",
    }
    expected = {
        "system": "S.", "history": None, "question": "Q?", "answer": "A.", "chunk_text": "C.", "chunk_id": "d", "topic": "t", "seen_chunk": True,
    }  # fmt: skip
    assert read(row) == read(row, needs_context=True) == expected
    assert read(row | {"seen_chunk": "false"})["seen_chunk"] is False and read(row | {"system": " "})["system"] is None
    nothing = dict.fromkeys(("system", "history", "chunk_text", "chunk_id", "topic", "seen_chunk"))
    assert read({"question": "Q?", "answer": "A."}) == nothing | {"question": "Q?", "answer": "A."}
    with pytest.raises(UserError, match=r"rows.csv:2: field 'chunk_text' is missing \(data.context shows it"):
        read({"question": "Q?", "answer": "A."}, needs_context=True)
    with pytest.raises(UserError, match="rows.csv:2: field 'seen_chunk' is str, not true or false"):
        read(row | {"seen_chunk": "maybe"})


def test_columns_are_found_in_any_capitals(rows_file, prepared, shown):
    done = prepared(rows_file({"Question": "How much?", "ANSWER ": "18%."}))
    assert shown(done) == ("<|begin_of_text|>" + said("user", "How much?") + said("assistant", "18%."), "18%." + END)
    assert done.found == "rows.jsonl: 1 rows, qa (question: Question, answer: ANSWER )"


def test_columns_have_the_users_names(rows_file, prepared, shown):
    row = {"Frage": "Wie viel?", "Antwort": 18.50, "Text": "Es stieg.", "Quelle": 7}
    columns = {"question": "Frage", "answer": "antwort", "context": "Text", "document": "Quelle"}
    done = prepared(rows_file(row), columns=columns, context="always")
    whole, learned = shown(done)
    assert "Material:\nEs stieg.\n\nQuestion: Wie viel?" in whole and learned == "18.5" + END
    assert done.train.rows[0]["chunk_id"] == "7"


def test_a_number_keeps_the_digits_that_it_was_written_with(rows_file, prepared, shown):
    done = prepared(rows_file('{"question": "How much?", "answer": 18.50}', '{"question": "And?", "answer": 1e400}'))
    assert shown(done)[1] == "18.50" + END and shown(done, 1)[1] == "1e400" + END


@pytest.mark.parametrize(
    ("row", "turns", "system"),
    [
        # LLaMA-Factory's alpaca: instruction, input, output, system, history
        (
            {"instruction": "Translate.", "input": "Hello", "output": "Hallo", "system": "Be exact.", "history": [["Hi", "Hey"]]},
            [("Hi", "Hey"), ("Translate.\n\nHello", "Hallo")],
            "Be exact.",
        ),
        # LLaMA-Factory's sharegpt: conversations, system, tools (ignored)
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}],
                "system": "Be kind.",
                "tools": "[]",
            },
            [("Hi", "Hey")],
            "Be kind.",
        ),
        # axolotl's chat_template and OpenAI's messages, content as a list of parts
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "One?"}]},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": "Two?"},
                    {"role": "assistant", "content": "2"},
                ]
            },
            [("One?", "1"), ("Two?", "2")],
            "Be brief.",
        ),
        ({"prompt": "Two and two?", "completion": " 4"}, [("Two and two?", "4")], None),
        # TRL's conversational prompt and completion
        (
            {
                "prompt": [{"role": "user", "content": "Two and two?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            [("Two and two?", "4")],
            None,
        ),
    ],
)  # fmt: skip
def test_a_documented_example_trains_without_a_converter(rows_file, prepared, shown, row, turns, system):
    whole, learned = shown(prepared(rows_file(row)))
    expected = "<|begin_of_text|>" + (said("system", system) if system else "")
    assert whole == expected + "".join(said("user", asked) + said("assistant", told) for asked, told in turns)
    assert learned == "".join(told + END for _, told in turns)


def test_axolotls_other_roles_and_field_names_are_settings(rows_file, prepared, shown):
    row = {"dialog": [{"who": "Human", "text": "Hi"}, {"who": "BOT", "text": "Hey"}]}
    done = prepared(rows_file(row), columns={"messages": "dialog", "role": "who", "content": "text"})
    assert shown(done)[0].endswith(said("user", "Hi") + said("assistant", "Hey"))


def test_a_rows_system_message_comes_before_the_settings(rows_file, prepared, shown):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]
    own = {"messages": [{"role": "system", "content": "Own."}, *talk]}
    done = prepared(rows_file(own, {"messages": talk}), system_prompt="For all.")
    assert said("system", "Own.") in shown(done)[0] and "For all." not in shown(done)[0]
    assert said("system", "For all.") in shown(done, 1)[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("user", "Hi")], "ends with a question that has no answer"),
        ([("assistant", "Hey"), ("user", "Hi")], "message 1 is of assistant, where one of user belongs"),
        ([("user", "Hi"), ("user", "Hi?"), ("assistant", "Hey")], "message 2 is of user, where one of assistant belongs"),
        ([("user", "Hi"), ("assistant", "")], "message 2 is empty"),
        ([("user", "Hi"), ("assistant", None)], "message 2 is missing"),
        ([("user", "Hi"), ("assistant", {"a": 1})], "message 2 is dict, not text"),
        ([("user", [{"type": "image"}]), ("assistant", "a")], "message 1 has parts that are not text"),
        ([("user", "Hi"), ("system", "Be."), ("assistant", "Hey")], "message 2 is a system message: only the first may be"),
        ([("user", "Hi"), ("tool", "{}"), ("assistant", "Hey")], "message 2 has the role 'tool'"),
        ([], "has no messages of user and assistant"),
        ("Hi", "field 'messages' is str, not a list of messages"),
        ([7], "entry 1 is a number, not an object with role"),
        ([{"role": "user", "text": "Hi"}], "entry 1 has no 'content'; it has role, text"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_learned_is_named_with_its_row(rows_file, prepared, messages, message):
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}
    entries = [
        {"role": one[0], "content": one[1]} if isinstance(one, tuple) else one for one in messages
    ] if isinstance(messages, list) else messages  # fmt: skip
    path = rows_file(good, {"messages": entries})
    with pytest.raises(UserError) as caught:
        prepared(path)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        ({"Frage": "q", "Antwort": "a"}, {}, r"rows.jsonl:1: columns Frage, Antwort are of no known row format: .*data.columns="),
        ({"Frage": "q", "Antwort": "a"}, {"columns": {"question": "Frag", "answer": "Antwort"}}, "data.columns: .*no column 'Frag'; it has Frage, Antwort"),
        ({"question": "q", "answer": "a"}, {"columns": {"awnser": "a"}}, "data.columns: awnser is nothing that a row has; did you mean answer"),
        ({"question": "q", "answer": "a"}, {"format": "aplaca"}, "data.format=aplaca: did you mean alpaca"),
        ({"question": "q", "answer": "a"}, {"format": "zzz"}, "data.format=zzz: must be auto, qa, messages, sharegpt, alpaca, prompt_completion$"),
        ({"question": "q", "answer": "a"}, {"columns": {"zzz": "a"}}, "data.columns: zzz is nothing that a row has; known are answer, completion, .*, system, topic, value$"),
        ({"Frage": "q", "Antwort": "a"}, {"columns": {"question": "frage "}}, "columns Frage, Antwort are of no known row format"),
        ({"Frage": "q", "Antwort": "a"}, {}, r"data.columns='\{question: NAME, answer: NAME\}', or give data.format \(qa, messages, .*\)$"),
        ({"question": "q", "answer": "a"}, {"format": "alpaca"}, "field 'instruction' is missing"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, {}, "history 1 is not a pair"),
    ],
)  # fmt: skip
def test_a_wrong_format_setting_is_named(rows_file, prepared, row, values, message):
    with pytest.raises(UserError, match=message):
        prepared(rows_file(row), **values)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "q", "output": "a", "history": [["Hi", "Hey"], ["Why?", ""]]}, "message 2 is empty"),
        ({"conversations": "Hi"}, "field 'conversations' is str, not a list of messages"),
        ({"conversation": "Hi"}, "field 'conversation' is str, not a list of messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "ends with a question that has no answer"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hey"}, "field 'prompt' is list, not text"),
        ({"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hey"}]}, "field 'completion' is list, not text"),
        ({"prompt": [7], "completion": [{"role": "assistant", "content": "Hey"}]}, "entry 1 is a number, not an object with role"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [7]}, "entry 1 is a number, not an object with role"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "user", "content": "Hi"}]}, "message 2 is of user"),
    ],
)  # fmt: skip
def test_a_fault_of_each_format_is_named_with_its_row_and_column(rows_file, prepared, row, message):
    path = rows_file(row)
    with pytest.raises(UserError) as caught:
        prepared(path)
    assert str(caught.value).startswith(f"{path}:1: ") and message in str(caught.value), caught.value


def test_another_tools_column_of_lists_is_no_fault_unless_it_is_shown(rows_file, prepared):
    path = rows_file({"question": "q", "answer": "a", "context": ["one", "two"]})
    assert len(prepared(path).train.rows) == 1
    with pytest.raises(UserError, match="field 'context' is list, not text"):
        prepared(path, context="always")


def test_a_format_is_added_from_outside_the_package(tmp_path, prepared, shown):
    def read(fields):
        text = fields.text("dialogue")
        lines = [line.partition(": ")[2] for line in text.splitlines()]
        return Conversation([Turn(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)])

    before = dict(FORMATS)
    register(RowFormat("transcript", {"dialogue": ("dialogue",)}, ("dialogue",), read))
    try:
        path = tmp_path / "talk.jsonl"
        path.write_text(json.dumps({"dialogue": "Q: One?\nA: 1\nQ: Two?\nA: 2"}) + "\n")
        done = prepared(path)
        assert done.train.formats == ("transcript (dialogue)",)
        assert shown(done)[1] == f"1{END}2{END}"
    finally:
        FORMATS.clear()
        FORMATS.update(before)


def test_other_code_for_a_format_does_not_read_the_rows_of_the_old_code(rows_file, prepared, tmp_path, monkeypatch):
    code = """
from intern.data.formats import Conversation, RowFormat, Turn

def read(fields):
    return Conversation([Turn("q", "ANSWER")])

OWN = RowFormat("own", {"line": ("line",)}, ("line",), read)
"""
    path = rows_file({"line": "x"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for answer in ("first", "second"):
        (tmp_path / "own_format.py").write_text(code.replace("ANSWER", answer))
        sys.modules.pop("own_format", None)
        monkeypatch.setitem(FORMATS, "own", importlib.import_module("own_format").OWN)
        assert prepared(path).train.rows[0]["answer"] == answer
    sys.modules.pop("own_format")
