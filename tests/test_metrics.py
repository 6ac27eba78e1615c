"""Scores against computations by hand and one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from easyeditor.core.likelihood import answers, mean_per_row, token_log_probs
from easyeditor.editors.summary import summarise, summary_metrics
from easyeditor.errors import UsageError
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.fluency import ngram_entropy
from easyeditor.metrics.fluency import words as word_tokens
from easyeditor.metrics.likelihood import read
from easyeditor.metrics.protocol import protocol
from easyeditor.metrics.quality import compare_locality, quality
from easyeditor.metrics.text import exact_match, normalise, readings, same_text
from easyeditor.requests import EditRequest, Probe
from families import build, raw, words

# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Illinois Institute,  of Technology. ", "illinois institute of technology"),
        ("A cat and an owl", "cat and owl"),
        ("Theatre another", "theatre another"),
        ("ＳＴＲＡＳＳＥ", "ｓｔｒａｓｓｅ"),
        ("Straße", "strasse"),
        ("U.S.", "us"),
        ("東京。", "東京。"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_readings() -> None:
    assert list(readings("St. Louis. It lies")) == ["St", "St. Louis", "St. Louis. It lies"]
    assert list(readings(" Paris\nand more. ")) == ["Paris"]
    assert list(readings("3.5 million! yes")) == ["3.5 million", "3.5 million! yes"]
    assert list(readings("東京。日本")) == ["東京", "東京。日本"]
    assert list(readings("")) == [""]


@pytest.mark.parametrize(
    ("said", "accepted", "score"),
    [
        ("Paris", ["Paris"], 1.0),
        ("the paris.", ["Paris"], 1.0),
        ("Paris. It is large", ["Paris"], 1.0),
        ("St. Louis. It lies", ["St. Louis"], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("Parisian", ["Paris"], 0.0),
        ("not Paris", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("NYC", ["New York", "NYC"], 1.0),
        ("Rome", ["New York", "NYC"], 0.0),
        ("東京。日本の", ["東京"], 1.0),
        ("Paris", [], None),
        ("Paris", ["", " . "], None),
        ("", [""], None),
    ],
)
def test_exact_match(said: str, accepted: list[str], score: float | None) -> None:
    assert exact_match(said, accepted) == score


def test_same_text() -> None:
    assert same_text("The Cat.", "cat") == 1.0 and same_text("cat", "cats") == 0.0 and same_text("", ".") == 1.0


# --- fluency -------------------------------------------------------------------------------------------------------


def entropy(*counts: int) -> float:
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts)


@pytest.mark.parametrize(
    ("text", "bigrams", "trigrams"),
    [
        ("a b c", (1, 1), (1,)),
        ("a a a a", (3,), (2,)),
        ("a b a b a", (2, 2), (2, 1)),
        ("the cat, the cat", (2, 1, 1), (1, 1, 1)),
    ],
)
def test_entropy_by_hand(text: str, bigrams: tuple[int, ...], trigrams: tuple[int, ...]) -> None:
    """The arithmetic mean over n = 2, 3 of weight times entropy in bits, with weights 2/3 and 4/3 (ROME's code)."""
    expected = (2 / 3 * entropy(*bigrams) + 4 / 3 * entropy(*trigrams)) / 2
    assert ngram_entropy([text]) == pytest.approx(expected, abs=1e-12)


def test_entropy_known_figures() -> None:
    assert ngram_entropy(["a b c"]) == pytest.approx(1 / 3)
    assert ngram_entropy(["a a a a"]) == 0.0
    assert ngram_entropy(["a b c", "a a a a"]) == pytest.approx(1 / 6)
    assert ngram_entropy(["a b c", "too short"]) == pytest.approx(1 / 3), "a text without trigrams is not a zero"
    assert ngram_entropy(["a b"]) is None and ngram_entropy([]) is None
    assert word_tokens("It's 3.5, isn't it?") == ["It's", "3", ".", "5", ",", "isn't", "it", "?"]


# --- likelihoods ---------------------------------------------------------------------------------------------------

PAIRS = [
    ("the capital of ada ra is", "lima"),
    ("bo lives in", "new york ."),
    ("where does the red cat of cy su live ?", "paris and then rome"),
    ("bo lives in", "oslo"),
]


def one_by_one(lm: LM, prompt: str, target: str) -> tuple[list[int], list[int], list[float]]:
    """Labels, likeliest tokens and log-probabilities from one plain pass of the model itself."""
    if lm.seq2seq:
        source, labels = list(lm.text.encode(prompt).ids), list(lm.text.encode(target).ids)
        with torch.no_grad():
            out = lm.model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[lm.decoder_start, *labels[:-1]]])
            )
        logits = out.logits[0]
    else:
        ids = list(lm.text.encode(f"{prompt} {target}").ids)
        start = len(lm.text.encode(prompt).ids)
        labels = ids[start:]
        with torch.no_grad():
            out = lm.model(input_ids=torch.tensor([ids]))
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[0, start - 1 : -1]
    logp = logits.log_softmax(-1)
    return labels, logp.argmax(-1).tolist(), [float(logp[i, label]) for i, label in enumerate(labels)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "t5", "chatglm", "bare"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_readings_of_answers(family: str, batch_size: int) -> None:
    lm = build(family)
    lm.tokenizer.padding_side = "left" if batch_size == 16 else "right"
    found = read(lm, [*PAIRS, PAIRS[0]], batch_size)
    assert set(found) == set(PAIRS)
    for pair in PAIRS:
        labels, best, logp = one_by_one(lm, *pair)
        assert found[pair].predicted == tuple(best)
        hits = sum(a == b for a, b in zip(best, labels, strict=True))
        assert found[pair].accuracy == pytest.approx(hits / len(labels))
        assert found[pair].log_prob == pytest.approx(sum(logp) / len(logp), abs=1e-4)


def test_token_log_probs_and_prompt_end() -> None:
    lm = build("llama")
    batch = answers(lm, PAIRS)
    with torch.no_grad():
        per_row = mean_per_row(token_log_probs(lm, batch), batch)
        flat = answers(lm, PAIRS, at_prompt_end=True)
        at_end = token_log_probs(lm, flat)
    for i, pair in enumerate(PAIRS):
        labels, _, logp = one_by_one(lm, *pair)
        assert float(per_row[i]) == pytest.approx(sum(logp) / len(logp), abs=1e-5)
        ids = lm.text.encode(pair[0]).ids
        with torch.no_grad():
            last = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(at_end[flat.rows == i], last[torch.tensor(labels)], atol=1e-5)


# --- all scores of a request ---------------------------------------------------------------------------------------


def request(target: str = "lima", truth: str | None = "oslo") -> EditRequest:
    return EditRequest(
        prompt="the capital of ada ra is",
        subject="ada ra",
        target_new=target,
        ground_truth=truth,
        rephrase_prompts=("where is ada ra", "ada ra lives in"),
        locality={
            "near": (Probe("the capital of bo su is", ("rome",)), Probe("cy lives in", ("paris",))),
            "open": (Probe("a red cat is"),),
        },
        portability={"hop": (Probe("the owl of ada ra is", ("blue", "green")), Probe("one two"))},
    )


def test_quality_has_every_score() -> None:
    lm, asked = build("gpt2"), request()
    scores = quality(lm, [asked], max_new_tokens=4, test_generation=True)[0]
    said = {p: answer(lm, [p], 4)[0] for p in (asked.prompt, *asked.rephrase_prompts, "the owl of ada ra is")}
    assert scores["rewrite_gen_content"] == [said[asked.prompt]]
    assert scores["rephrase_gen_content"] == [said[p] for p in asked.rephrase_prompts]
    assert scores["rewrite_gen"] == [exact_match(said[asked.prompt], ["lima"])]
    labels, best, _ = one_by_one(lm, asked.prompt, "lima")
    assert scores["rewrite_acc"] == [float(labels == best)]
    assert scores["locality"]["near_output"] == [
        one_by_one(lm, p.prompt, p.answers[0])[1] for p in asked.locality["near"]
    ]
    assert scores["portability"]["hop_gen"][0] == exact_match(said["the owl of ada ra is"], ["blue", "green"])
    assert scores["fluency"]["ngram_entropy"] > 0
    for name in ("rewrite", "rewrite_gen", "rephrase", "rephrase_gen", "portability.hop", "probability.NS"):
        assert scores["metric_meta"][name]["protocol"] and scores["metric_meta"][name]["comparable_group"]


def test_what_cannot_be_scored_is_none_and_never_zero() -> None:
    lm = build("gpt2")
    before, after = (quality(lm, [request()], max_new_tokens=3)[0] for _ in range(2))
    compare_locality(lm, before, after)
    assert after["locality"]["open_output"] == [None] and after["locality"]["open_acc"] == [None]
    assert after["locality"]["open_gen"] == [1.0], "agreement of free answers needs no gold"
    assert after["portability"]["hop_acc"][1] is None and after["portability"]["hop_gen"][1] is None
    bare = quality(lm, [EditRequest(prompt="bo lives in", target_new="lima")], max_new_tokens=3)[0]
    assert not {"rephrase_acc", "rephrase_gen", "fluency"} & set(bare)
    assert bare["probability"] == {} and bare["locality"] == {} and bare["portability"] == {}
    short = quality(lm, [EditRequest(prompt="bo", target_new="lima")], max_new_tokens=0, test_generation=True)[0]
    assert short["rewrite_gen"] == [0.0], "an answer that is wrong is a zero"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_probabilities(family: str) -> None:
    """ES, PS: the new answer is likelier than the old; NS: a neighbour's own answer is likelier than the new."""
    lm, asked = build(family), request()

    def mean(prompt: str, target: str) -> float:
        logp = one_by_one(lm, prompt, target)[2]
        return sum(logp) / len(logp)

    found = quality(lm, [asked], max_new_tokens=2)[0]["probability"]
    assert found["ES"] == [float(mean(asked.prompt, "lima") > mean(asked.prompt, "oslo"))]
    assert found["PS"] == [float(mean(p, "lima") > mean(p, "oslo")) for p in asked.rephrase_prompts]
    near = asked.locality["near"]
    assert found["NS"] == [float(mean(p.prompt, p.answers[0]) > mean(p.prompt, "lima")) for p in near]
    swapped = quality(lm, [request("oslo", "lima")], max_new_tokens=2)[0]["probability"]
    assert swapped["ES"] == [1 - found["ES"][0]] and swapped["PS"] == [1 - x for x in found["PS"]]
    assert "ES" not in quality(lm, [request(truth=None)], max_new_tokens=2)[0]["probability"]


def test_a_neighbour_with_the_new_answer_is_no_neighbour() -> None:
    found = quality(build("gpt2"), [request(target="rome")], max_new_tokens=2)[0]["probability"]
    assert len(found["NS"]) == 1


def texts_of(scores: Any) -> Iterator[Any]:
    for key, value in scores.items():
        if key.endswith("_gen_content"):
            yield key, value
        elif isinstance(value, dict) and key != "metric_meta":
            yield from texts_of(value)


def test_gold_strings_do_not_touch_generated_texts() -> None:
    """Another gold string, longer or shorter, and what was generated stays the same, byte for byte."""
    lm = build("llama")
    found = [
        list(texts_of(quality(lm, [request(target, truth)], max_new_tokens=6)[0]))
        for target, truth in (("lima", "oslo"), ("new york and then so", "a"), ("oslo", None))
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 5


@pytest.mark.parametrize("family", ["llama", "chatglm"])
def test_batch_and_order_do_not_touch_scores(family: str) -> None:
    lm = build(family)
    asked = [request(), request("paris", "rome"), EditRequest(prompt="bo", target_new="a cat and a dog")]
    whole = quality(lm, asked, max_new_tokens=4, batch_size=32)
    assert whole == quality(lm, asked, max_new_tokens=4, batch_size=32)
    for batch_size in (1, 8):
        for a, b in zip(quality(lm, asked, max_new_tokens=4, batch_size=batch_size), whole, strict=True):
            assert a == b
    assert quality(lm, asked[::-1], max_new_tokens=4)[::-1] == whole
    assert [quality(lm, [each], max_new_tokens=4)[0] for each in asked] == whole


def test_locality_is_agreement_with_before() -> None:
    first, second = build("gpt2"), LM.wrap(raw("gpt2", seed=1), words())
    before, after = (quality(lm, [request()], max_new_tokens=3)[0] for lm in (first, second))
    compare_locality(second, before, after)
    for i in range(2):
        a, b = before["locality"]["near_output"][i], after["locality"]["near_output"][i]
        assert after["locality"]["near_acc"][i] == sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        texts = (each["locality"]["near_gen_content"][i] for each in (before, after))
        assert after["locality"]["near_gen"][i] == same_text(*texts)
    same = quality(first, [request()], max_new_tokens=3)[0]
    compare_locality(first, before, same)
    assert same["locality"]["near_acc"] == [1.0, 1.0] and same["locality"]["near_gen"] == [1.0, 1.0]


# --- protocols and means -------------------------------------------------------------------------------------------


def test_protocols() -> None:
    lm, t5 = build("gpt2"), build("t5")
    plain = protocol(lm, "generated", "rewrite_gen")
    assert plain["protocol"] == "free_generation" and plain["answer_in_context"] is False
    lm.rewriters.append(lambda prompt: prompt)
    told = protocol(lm, "generated", "rewrite_gen")
    assert told["protocol"] == "icl_free_generation" and told["answer_in_context"] is True
    lm.rewriters.clear()
    lm.text.chat = True
    assert protocol(lm, "generated", "x")["protocol"] == "free_generation+chat_template"
    groups = {
        protocol(each, way, "x")["comparable_group"] for each in (lm, t5) for way in ("teacher_forced", "generated")
    }
    assert len(groups) == 4


def record(value: float | None, group: str = "lm.free") -> dict[str, Any]:
    return {"post": {"rewrite_gen": [value], "metric_meta": {"rewrite_gen": {"comparable_group": group}}}}


def test_means_come_with_number_and_error() -> None:
    found = summarise([record(1.0), record(0.0), record(None), record(1.0)])["post"]["rewrite_gen"]
    assert (found["n"], found["unscored"], found["protocol"]) == (3, 1, "lm.free")
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["stderr"] == pytest.approx(torch.tensor([1.0, 0.0, 1.0]).std().item() / math.sqrt(3))
    one = summarise([record(1.0)])["post"]["rewrite_gen"]
    assert (one["mean"], one["n"], one["stderr"]) == (1.0, 1, None)
    none = summarise([record(None)])["post"]["rewrite_gen"]
    assert (none["mean"], none["n"], none["stderr"], none["unscored"]) == (None, 0, None, 1)
    assert summarise([]) == {}


def test_two_protocols_are_not_mixed() -> None:
    with pytest.raises(UsageError, match="'rewrite_gen' under different protocols"):
        summarise([record(1.0), record(1.0, "lm.icl_free")])
    assert summary_metrics(record(1.0))["post"]["rewrite_gen"]["mean"] == 1.0


def test_means_of_real_scores() -> None:
    lm = build("gpt2")
    records = []
    for asked in (request(), request("paris", "rome")):
        pre, post = (quality(lm, [asked], max_new_tokens=3)[0] for _ in range(2))
        compare_locality(lm, pre, post)
        records.append({"pre": pre, "post": post})
    found = summarise(records)
    assert found["post"]["rewrite_acc"]["n"] == 2 and found["post"]["rephrase_gen"]["n"] == 4
    assert found["post"]["locality.near_acc"]["mean"] == 1.0 and found["post"]["locality.near_acc"]["n"] == 4
    assert found["post"]["locality.open_acc"]["n"] == 0 and found["post"]["locality.open_acc"]["mean"] is None
    assert found["post"]["portability.hop_acc"]["unscored"] == 2
    assert all(score["protocol"] for phase in found.values() for score in phase.values())
    with pytest.raises(UsageError):
        lm.text.chat = True
        lm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        summarise([*records, {"post": quality(lm, [request()], max_new_tokens=3)[0]}])
