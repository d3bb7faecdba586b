"""The judge against a real HTTP server on this machine."""

import json

import pytest
from helpers import Handler, Server

from intern.errors import UserError
from intern.evaluation.judge import Case, Judge, JudgeConfig


@pytest.fixture
def judged(tmp_path):
    servers = []

    def score(cases, *replies, retries=2, name="judge.jsonl"):
        servers.append(Server(*replies))
        config = JudgeConfig(servers[-1].url, "referee", "TEST_JUDGE_KEY", 1, retries, 5.0)
        return Judge(config, tmp_path / name).score(cases), servers[-1]

    yield score
    for server in servers:
        server.shutdown()
        server.server_close()


CASES = [Case("How much?", "18%", answer) for answer in ("18%", "about 18 or 20", "7%", "eighteen")]


def test_verdicts_become_scores_and_the_key_goes_into_the_header_alone(judged, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-123")
    replies = [(200, "CORRECT"), (200, "**PARTLY**: half"), (200, "WRONG"), (200, "CORRECTLY not a verdict")]
    scores, server = judged(CASES, *replies, retries=0)
    assert scores == [1.0, 0.5, 0.0, None]
    path, authorization, body = server.requests[0]
    assert (path, authorization, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret-123",
        "referee",
        0,
    )
    assert json.loads(body["messages"][1]["content"]) == {"question": "How much?", "reference": "18%", "answer": "18%"}
    assert (
        "data leaves this machine" in caplog.text
        and server.url in caplog.text
        and "no verdict on 1 answers" in caplog.text
    )
    assert "secret" not in (tmp_path / "judge.jsonl").read_text() + caplog.text


def test_verdicts_are_asked_for_once_and_failures_again(judged, tmp_path, caplog):
    server = Server((200, "CORRECT"), (400, "no"), (200, "WRONG"))
    config = JudgeConfig(server.url, "referee", "TEST_JUDGE_KEY", 1, 0, 5.0)
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:2]) == [1.0, None]
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:2]) == [1.0, 0.0]
    assert len(server.requests) == 3
    caplog.clear()
    server.shutdown()
    server.server_close()
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:1]) == [1.0] and not caplog.text


def test_a_failure_that_may_pass_is_tried_again_and_a_refusal_is_not(judged):
    scores, server = judged(CASES[:1], (503, ""), (429, ""), (200, "CORRECT"))
    assert scores == [1.0] and len(server.requests) == 3
    scores, server = judged(CASES[:1], (401, ""), (200, "CORRECT"), name="other.jsonl")
    assert scores == [None] and len(server.requests) == 1


def test_a_server_that_is_not_there_leaves_the_answers_without_verdict(tmp_path, caplog):
    config = JudgeConfig("http://127.0.0.1:9/v1", "referee", "TEST_JUDGE_KEY", 1, 0, 5.0)
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:1]) == [None]
    assert "ConnectError: 1" in caplog.text


@pytest.mark.parametrize(
    ("url", "model", "workers", "message"),
    [("localhost:8000", "m", 1, "judge.url"), ("http://x", None, 1, "judge.model"), ("http://x", "m", 0, "workers")],
)
def test_a_wrong_setting_is_named(tmp_path, url, model, workers, message):
    with pytest.raises(UserError, match=message):
        Judge(JudgeConfig(url, model, "KEY", workers, 0, 5.0), tmp_path / "judge.jsonl")


def test_a_verdict_of_another_server_is_not_taken(judged):
    assert judged(CASES[:1], (200, "CORRECT"))[0] == [1.0]
    assert judged(CASES[:1], (200, "WRONG"))[0] == [0.0]


def test_pauses_before_retries_grow_and_are_bounded(judged, monkeypatch):
    pauses = []
    monkeypatch.setattr("intern.evaluation.judge.time.sleep", pauses.append)
    monkeypatch.setattr("helpers.Handler.send_header", without_retry_after)
    judged(CASES[:1], (503, ""), retries=8)
    assert pauses[:4] == [0, 0.5, 1, 2] and max(pauses) == pauses[-1] == 30


def without_retry_after(handler, name, value, send=Handler.send_header):
    if name != "Retry-After":
        send(handler, name, value)


def test_a_damaged_store_of_verdicts_is_read_as_far_as_it_goes(tmp_path):
    server = Server((200, "CORRECT"))
    config = JudgeConfig(server.url, "referee", "TEST_JUDGE_KEY", 1, 0, 5.0)
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:1]) == [1.0]
    with (tmp_path / "judge.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"key"\n[1]\n')
    assert Judge(config, tmp_path / "judge.jsonl").score(CASES[:1]) == [1.0] and len(server.requests) == 1
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "https://host/v1?api_key=hunter2"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(tmp_path, url):
    with pytest.raises(UserError, match="name it with judge.key_variable") as refused:
        Judge(JudgeConfig(url, "referee", "KEY", 1, 0, 5.0), tmp_path / "judge.jsonl")
    assert "hunter2" not in str(refused.value)
