"""The documented example formats of other trainers: trained without a converter, or refused with what to do."""

import json

import pytest

from intern.data.formats import RowSettings, conversation_row, detect
from intern.errors import UserError


def read(row, **settings):
    layout = detect(row, RowSettings(**settings), "rows.jsonl:1")
    return layout.format.name, conversation_row(layout, row, "rows.jsonl:1")


PAIR = [("user", "Where do riders pay most?"), ("assistant", "In airports.")]
HUMAN = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in PAIR]
OPENAI = [{"role": role, "content": text} for role, text in PAIR]
ASKED, SAID = PAIR[0][1], PAIR[1][1]

TRAINED = {
    # LLaMA-Factory
    "alpaca": ({"instruction": ASKED, "input": "", "output": SAID}, "alpaca"),
    "alpaca with system and history": (
        {"instruction": ASKED, "input": "", "output": SAID, "system": "Be brief.", "history": [["Hi", "Hello"], ["Who?", "Me"]]},
        "alpaca",
    ),
    "sharegpt with system and empty tools": ({"conversations": HUMAN, "system": "Be brief.", "tools": "[]"}, "sharegpt"),
    "openai messages": ({"messages": [{"role": "system", "content": "Be brief."}, *OPENAI]}, "messages"),
    # axolotl
    "open orca": ({"id": "cot.1", "system_prompt": "Be brief.", "question": ASKED, "response": SAID}, "qa"),
    "gpteacher": ({"instruction": ASKED, "input": "", "response": SAID}, "alpaca"),
    "oasst": ({"INSTRUCTION": ASKED, "RESPONSE": SAID}, "alpaca"),
    "alpaca chat with a history of nothing": ({"instruction": ASKED, "output": SAID, "history": []}, "alpaca"),
    "chat template with weights of one": ({"messages": [OPENAI[0], OPENAI[1] | {"weight": 1}]}, "messages"),
    # TRL and datasets of the hub
    "prompt and completion": ({"prompt": ASKED, "completion": SAID}, "prompt_completion"),
    "conversational prompt and completion": ({"prompt": OPENAI[:1], "completion": OPENAI[1:]}, "prompt_completion"),
    "dolly": ({"instruction": ASKED, "context": "A table.", "response": SAID, "category": "closed_qa"}, "alpaca"),
    "conversations with role and content": ({"conversations": OPENAI}, "sharegpt"),
    "messages with from and value": ({"messages": HUMAN}, "messages"),
    "content in parts": ({"messages": [OPENAI[0] | {"content": [{"type": "text", "text": ASKED}]}, OPENAI[1]]}, "messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_a_documented_format_is_trained_without_a_converter(name):
    row, expected = TRAINED[name]
    found, made = read(row)
    assert (found, made["question"], made["answer"]) == (expected, ASKED, SAID)
    assert made["system"] == ("Be brief." if "Be brief." in json.dumps(row) else None)
    assert len(made["history"] or []) == len(row.get("history", []))


TOOL = {"from": "function_call", "value": '{"name": "price"}'}
REFUSED = {
    "sharegpt with tools": ({"conversations": HUMAN, "tools": '[{"name": "price"}]'}, "has tools: calls of tools are not trained"),
    "sharegpt with function calls": ({"conversations": [HUMAN[0], TOOL, {"from": "observation", "value": "9"}, HUMAN[1]]}, "message 2 has the role 'function_call': calls of tools"),
    "openai tool calls": ({"messages": [OPENAI[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "message 2 calls a tool"),
    "openai tool results": ({"messages": [OPENAI[0], {"role": "tool", "content": "9"}]}, "message 2 has the role 'tool': calls of tools"),
    "pretraining text": ({"text": "Once upon a time."}, "whole texts: a chat model is trained on questions and answers"),
    "input_output segments": ({"segments": [{"label": True, "text": "<s>Hi"}]}, "segments of rendered text: write each row as messages"),
    "preferences": ({"instruction": ASKED, "input": "", "chosen": SAID, "rejected": "No."}, "preferences: answers are learned, not compared"),
    "preferences of conversations": ({"conversations": HUMAN[:1], "chosen": HUMAN[1], "rejected": HUMAN[1]}, "not compared"),
    "kto": ({"instruction": ASKED, "output": SAID, "kto_tag": False}, "field 'kto_tag' says whether the answer is a good one"),
    "unpaired preferences": ({"prompt": ASKED, "completion": SAID, "label": False}, "field 'label' says whether the answer is a good one"),
    "pictures": ({"messages": OPENAI, "images": ["a.png"]}, "has images: only text can be trained on"),
    "answers that are not learned": ({"messages": [*OPENAI[:1], OPENAI[1] | {"weight": 0}]}, "message 2 has weight=0"),
    "answers that axolotl skips": ({"messages": [*OPENAI[:1], OPENAI[1] | {"train": False}]}, "set data.loss_on=last"),
    "tokens": ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens: give the texts"),
    "article and summary": ({"article": "A.", "summary": "B."}, "name the question and the answer with data.columns="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_documented_format_that_has_no_question_and_answer_is_refused_with_what_to_do(name):
    row, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        read(row)
    assert message in str(caught.value) and str(caught.value).startswith("rows.jsonl:1: ")


def test_the_remedies_work():
    row = {"prompt": ASKED, "chosen": SAID, "rejected": "No."}
    assert read(row, columns={"question": "prompt", "answer": "chosen"})[1]["answer"] == SAID
    assert read({"article": ASKED, "summary": SAID}, columns={"question": "article", "answer": "summary"})[0] == "qa"
