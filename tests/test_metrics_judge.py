"""The judge against a real HTTP server of this process, and against a local model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy
from easyeditor.errors import UsageError
from easyeditor.metrics.judge import Case, Judge
from easyeditor.metrics.quality import quality
from easyeditor.metrics.scores import Scores
from endpoint import Stub, running
from families import build


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running() as server:
        yield server


def judge(stub: Stub, cache: Path | None = None, **options: Any) -> Judge:
    return Judge("stub-1", stub.url, "secret", cache, **{"wait": 0.0, "timeout": 5.0, **options})


RIGHT, WRONG = Case("where?", ("oslo", "Oslo"), "oslo"), Case("where?", ("oslo",), "not oslo")


def test_verdicts_are_asked_once_and_kept(stub: Stub, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "verdicts.jsonl"
    first = judge(stub, cache)
    assert first.verdicts([RIGHT, WRONG, RIGHT, Case("open", (), "x")]) == [1.0, 0.0, 1.0, None]
    assert len(stub.asked) == 2 and set(stub.keys) == {"Bearer secret"}
    assert {asked["path"] for asked in stub.asked} == {"/v1/chat/completions"}
    assert all(asked["model"] == "stub-1" and asked["temperature"] == 0 for asked in stub.asked)
    assert "secret" not in cache.read_text() and "secret" not in repr(first)
    assert judge(stub, cache).verdicts([WRONG, RIGHT]) == [0.0, 1.0] and len(stub.asked) == 2, "from the disk"
    assert Judge("stub-2", stub.url, cache=cache).verdicts([RIGHT]) == [1.0] and len(stub.asked) == 3, "another judge"


def test_a_cache_that_a_killed_run_left_unfinished(stub: Stub, tmp_path: Path) -> None:
    cache = tmp_path / "verdicts.jsonl"
    judge(stub, cache).verdicts([RIGHT])
    with cache.open("a") as file:
        file.write('{"key": "abc", "verd')
    assert judge(stub, cache).verdicts([RIGHT, WRONG]) == [1.0, 0.0] and len(stub.asked) == 2
    assert judge(stub, cache).verdicts([RIGHT, WRONG]) == [1.0, 0.0] and len(stub.asked) == 2
    with pytest.raises(UsageError, match="is a folder"):
        judge(stub, tmp_path)


def test_failures_that_go_away_are_repeated(stub: Stub) -> None:
    stub.failures = [500, 429]
    one = judge(stub, workers=1)
    assert one.verdicts([RIGHT]) == [1.0] and len(stub.asked) == 3 and one.silent is None


@pytest.mark.parametrize(("status", "calls"), [(401, 1), (503, 4)])
def test_failures_that_stay_end_the_asking(
    stub: Stub, status: int, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    stub.failures = [status] * 50
    one = judge(stub, workers=1)
    with caplog.at_level(logging.WARNING):
        assert one.verdicts([RIGHT, WRONG]) == [None, None], "unscored, and no zero"
    assert len(stub.asked) == calls and one.silent is not None
    assert one.verdicts([RIGHT]) == [None] and len(stub.asked) == calls
    assert f"it answered {status}" in caplog.messages[0] and "2 of 2" in caplog.messages[0]


def test_what_was_finished_stays(stub: Stub, tmp_path: Path) -> None:
    one = judge(stub, tmp_path / "v.jsonl", workers=1)
    assert one.verdicts([RIGHT]) == [1.0]
    stub.failures = [403]
    assert one.verdicts([RIGHT, WRONG]) == [1.0, None]
    assert judge(stub, tmp_path / "v.jsonl").verdicts([RIGHT, WRONG]) == [1.0, 0.0], "asked again another time"


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    one = Judge("x", "http://127.0.0.1:9/v1", wait=0.0, timeout=2.0, retries=1)
    assert one.verdicts([RIGHT, WRONG]) == [None, None]
    assert len(caplog.messages) == 1 and "cannot be reached" in caplog.messages[0]


@pytest.mark.parametrize(
    "said", ["Perhaps", "", "A careful judge cannot say", "AB", "I think so", "B-flat major", "42"]
)
def test_nonsense_is_no_verdict(stub: Stub, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stub.says = said or " "
    assert judge(stub, tmp_path / "v.jsonl").verdicts([RIGHT]) == [None]
    assert not (tmp_path / "v.jsonl").exists() and "It did not say A or B" in caplog.messages[0]


@pytest.mark.parametrize("raw", [b"<html>busy</html>", b'{"choices": []}', b"[1]", b"", b"\xff\xfe"])
def test_an_answer_that_is_none(stub: Stub, raw: bytes) -> None:
    stub.raw = raw
    one = judge(stub)
    assert one.verdicts([RIGHT]) == [None]
    stub.raw = None
    assert one.verdicts([RIGHT]) == [1.0]


@pytest.mark.parametrize(
    ("said", "verdict"), [("A", 1.0), (" b.", 0.0), ("(A)", 1.0), ("**B**", 0.0), ("Answer: A", 1.0)]
)
def test_ways_to_say_it(stub: Stub, said: str, verdict: float) -> None:
    stub.says = said
    assert judge(stub).verdicts([RIGHT]) == [verdict]


def test_the_budget(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    one = judge(stub, calls=3, workers=1)
    cases = [Case("q", ("a",), str(i)) for i in range(5)]
    assert one.verdicts(cases) == [0.0, 0.0, 0.0, None, None]
    assert len(stub.asked) == 3 and "budget of calls is used up" in caplog.messages[0]


@pytest.mark.parametrize("address", [None, "", "api.example.org/v1", "file:///etc/passwd"])
def test_an_address_that_is_none(address: str | None) -> None:
    with pytest.raises(UsageError, match="Expected an http or https URL"):
        Judge("x", address)


def test_a_local_model_judges() -> None:
    lm = build("gpt2")
    one = Judge(lm)
    assert one.name == lm.name
    assert one.verdicts([RIGHT, WRONG]) == [None, None], "a model with random weights has no opinion"
    letter, end = lm.tokenizer.convert_tokens_to_ids("a"), lm.tokenizer.eos_token_id
    prompt_length: list[int] = []

    def says_a(ids: Tensor, logits: Tensor) -> Tensor:
        """The letter, and then the end."""
        prompt_length.append(ids.shape[1])
        token = letter if ids.shape[1] == prompt_length[0] else end
        return nn.functional.one_hot(torch.full((len(ids),), token), logits.shape[-1]).float()

    lm.processors.append(says_a)
    assert one.verdicts([RIGHT]) == [1.0]


def test_scores_of_a_judge(stub: Stub) -> None:
    lm, asked = build("gpt2"), toy.request(0)
    scores = quality(lm, [asked], scores=Scores(judge=judge(stub)))[0]
    assert scores["rewrite_judge"] == scores["rewrite_gen"] == [0.0]
    assert len(scores["rephrase_judge"]) == 2
    assert scores["metric_meta"]["rewrite_judge"]["scorer"] == "llm_judge:stub-1"
    stub.failures = [400]
    other = quality(lm, [toy.request(1)], scores=Scores(judge=judge(stub, workers=1)))[0]
    assert other["rewrite_judge"] == [None] and other["rewrite_gen"] == [0.0], "the other scores are there"
