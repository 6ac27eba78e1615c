"""Scores that are computed on request, against computations by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.summary import summarise
from easyeditor.edits.delta import Dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import applied
from easyeditor.errors import MissingExtra, UsageError
from easyeditor.lm.generate import answer, sample
from easyeditor.lm.model import LM
from easyeditor.metrics.capability import capability
from easyeditor.metrics.divergence import KEPT, jensen_shannon, pack, unpack
from easyeditor.metrics.extra import drawn
from easyeditor.metrics.fluency import ngram_entropy, repetition
from easyeditor.metrics.likelihood import read, read_texts
from easyeditor.metrics.locality import by_kind, kind
from easyeditor.metrics.overlap import bleu, rouge, similarity
from easyeditor.metrics.perplexity import Perplexity, alarm, fitting, perplexity
from easyeditor.metrics.quality import compare_locality, quality
from easyeditor.metrics.retention import retention
from easyeditor.metrics.robustness import is_question, negated, questions
from easyeditor.metrics.scores import Scores
from easyeditor.metrics.shared import shared_logits, shared_rows
from easyeditor.metrics.text import exact_match
from easyeditor.requests import EditRequest, Probe
from families import build


def request() -> EditRequest:
    return EditRequest(
        prompt="the capital of ada ra is",
        target_new="lima",
        ground_truth="oslo",
        rephrase_prompts=("where is ada ra", "ada ra lives in"),
        locality={"neighborhood": (Probe("the capital of bo su is", ("rome",)), Probe("cy lives in", ("paris",)))},
    )


def shaken(lm: LM, scale: float) -> WeightEdit:
    """A change at random of one projection of a GPT-2."""
    name = "transformer.h.1.mlp.c_proj.weight"
    d_in, d_out = lm.model.get_parameter(name).shape
    noise = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    return WeightEdit(deltas={name: Dense(noise * scale)})


# --- divergence ----------------------------------------------------------------------------------------------------


def js(p: torch.Tensor, q: torch.Tensor) -> float:
    """By the definition: the mean divergence from both to their mean, in bits."""
    m = (p + q) / 2
    return float(sum((x * (x / m).log2()).nan_to_num().sum() for x in (p, q)) / 2)


def test_divergence_of_small_vocabularies_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = (torch.randn(96, generator=generator) * 3 for _ in range(2))
        expected = js(a.double().softmax(-1), b.double().softmax(-1))
        assert jensen_shannon(pack(a), pack(b)) == pytest.approx(expected, abs=1e-6)
        assert jensen_shannon(pack(a), pack(b)) == jensen_shannon(pack(b), pack(a))
        assert jensen_shannon(pack(a), pack(a)) == 0.0
    sure = torch.full((96,), -200.0)
    left, right = sure.clone(), sure.clone()
    left[3] = right[5] = 200.0
    assert jensen_shannon(pack(left), pack(right)) == pytest.approx(1.0)


def test_divergence_of_large_vocabularies() -> None:
    """What is not stored is spread evenly; the error is bounded by the probability that is not stored."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50_000, generator=generator) * 4 for _ in range(2))
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    rest = max(1 - float(x.topk(KEPT).values.sum()) for x in (p, q))
    assert abs((jensen_shannon(pack(a), pack(b)) or 0.0) - js(p, q)) <= rest
    assert len(pack(a)) < 3000
    stored = unpack(pack(a))
    assert stored.probs.sum() + (50_000 - KEPT) * stored.other == pytest.approx(1.0)
    assert jensen_shannon(pack(a), pack(b[:400])) is None, "two vocabularies"


def test_divergence_in_a_measurement() -> None:
    lm, asked = build("gpt2"), request()
    before, same = (quality(lm, [asked], scores=Scores(divergence=True))[0] for _ in range(2))
    json.dumps(before)
    compare_locality(lm, before, same)
    assert same["locality"]["neighborhood_js"] == [0.0] * 2 and "neighborhood_next" not in same["locality"]
    with applied(lm, shaken(lm, 30.0)):
        after = quality(lm, [asked], scores=Scores(divergence=True))[0]
        compare_locality(lm, before, after)
        probe = asked.locality["neighborhood"][0].prompt
        with torch.no_grad():
            new = lm.model(torch.tensor([lm.text.encode(probe).ids])).logits[0, -1].double().softmax(-1)
    with torch.no_grad():
        old = lm.model(torch.tensor([lm.text.encode(probe).ids])).logits[0, -1].double().softmax(-1)
    assert after["locality"]["neighborhood_js"][0] == pytest.approx(js(old, new), rel=1e-3) != 0.0
    assert after["metric_meta"]["locality.neighborhood_js"]["kind"] == "near"
    found = summarise([{"pre": before, "post": after}])
    assert found["post"]["locality.neighborhood_js"]["n"] == 2 and "locality.neighborhood_next" not in found["pre"]


def test_divergence_against_a_measurement_without() -> None:
    lm, asked = build("gpt2"), EditRequest("bo lives in", "lima", locality={"far": (Probe("a red cat is"),)})
    before, after = quality(lm, [asked])[0], quality(lm, [asked], scores=Scores(divergence=True))[0]
    compare_locality(lm, before, after)
    assert "far_js" not in after["locality"] and after["locality"]["far_gen"] == [1.0]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("neighborhood", "near"),
        ("Relation_Specificity", "near"),
        ("same_subject", "near"),
        ("attribute", "near"),
        ("Forgetfulness", "far"),
        ("distracting_neighbor", "distracting"),
        ("open", None),
    ],
)
def test_kinds_of_locality(name: str, known: str | None) -> None:
    assert kind(name) == known


def test_locality_by_kind() -> None:
    scores = [{"locality": {"neighborhood_acc": [1.0, 0.5], "open_gen": [None], "neighborhood_output": [[1]]}}] * 2
    assert by_kind(scores) == {"near": {"acc": [1.0, 0.5, 1.0, 0.5]}, "other": {"gen": [None, None]}}


# --- one prompt, several answers -----------------------------------------------------------------------------------

SEVERAL = [
    (prompt, target)
    for prompt in ("the capital of ada ra is", "bo lives in", "where does the red cat of cy su live ?", "one")
    for target in ("lima", "new york .", "paris and then rome")
] + [("two", "oslo"), ("two three", "oslo")]
FAMILIES_READ = ["gpt2", "llama", "mistral", "gemma2", "qwen2", "bloom", "falcon", "opt", "neox", "t5", "chatglm"]


@pytest.mark.parametrize("family", FAMILIES_READ)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_prompt_is_computed_once_for_all_its_answers(family: str, batch_size: int) -> None:
    lm = build(family)
    found = read(lm, SEVERAL, batch_size)
    for pair in SEVERAL:
        alone = read(lm, [pair])[pair]
        assert found[pair].predicted == alone.predicted and found[pair].accuracy == alone.accuracy
        assert found[pair].log_prob == pytest.approx(alone.log_prob, abs=1e-4)


def test_families_that_share() -> None:
    shared = {family for family in FAMILIES_READ if shared_rows(build(family), SEVERAL)}
    assert shared >= {"gpt2", "llama", "mistral", "gemma2", "qwen2"}
    lm = build("gpt2")
    groups = shared_rows(lm, SEVERAL)
    with torch.no_grad():
        assert shared_logits(lm, groups) is not None
        assert shared_logits(build("chatglm"), groups) is None, "a cache of its own kind: every answer by itself"
    assert sorted(len(group) for group in groups) == [3, 3, 3], "a prompt of one token has nothing to share"


# --- other ways to ask ---------------------------------------------------------------------------------------------


def test_negation() -> None:
    assert negated("The capital of France is") == "The capital of France is not"
    assert negated("Ada lives in") == "It is not true that Ada lives in"
    assert negated("Where does Ada live?") is None and is_question("Question: ") and not is_question("He is")
    assert negated("The basis") == "It is not true that The basis"


def test_questions_of_a_request() -> None:
    asked = EditRequest("Ada lives in", "Oslo", ground_truth="Rome")
    found = questions(asked, prefix=" The sea is deep. ")
    assert [(q.kind, q.answers, q.against) for q in found] == [
        ("negation", ("Oslo",), None),
        ("true_false", ("True",), "False"),
        ("true_false", ("False",), "True"),
        ("cloze", ("Oslo",), None),
        ("behind_text", ("Oslo",), None),
    ]
    assert found[1].prompt == "True or false? Ada lives in Oslo. Answer:" and "Rome" in found[2].prompt
    assert found[4].prompt == "The sea is deep.\n\nAda lives in"
    assert [q.kind for q in questions(EditRequest("Where?", "Oslo"))] == ["true_false", "cloze"]
    assert questions(asked, forms=False) == [] and len(questions(asked, forms=False, prefix="x")) == 1


def test_robustness_in_a_measurement() -> None:
    lm, asked = build("gpt2"), request()
    plain = quality(lm, [asked])[0]
    scores = quality(lm, [asked], scores=Scores(robustness=True, prefix="a red owl ."))[0]
    group = scores["robustness"]
    assert group["behind_text_gen_content"] == answer(lm, [f"a red owl .\n\n{asked.prompt}"])
    assert group["negation_gen"] == [1.0 - (exact_match(group["negation_gen_content"][0], ["lima"]) or 0.0)]
    assert len(group["true_false_gen"]) == len(group["true_false_likelier"]) == 2 and len(group["cloze_gen"]) == 1
    statement = "True or false? the capital of ada ra is lima. Answer:"
    true, false = (read(lm, [(statement, word)])[statement, word].log_prob for word in ("True", "False"))
    assert group["true_false_likelier"][0] == float(true > false)
    assert {key: scores[key] for key in plain if key != "metric_meta"} == {
        key: plain[key] for key in plain if key != "metric_meta"
    }, "the other scores are as they were"
    assert scores["metric_meta"]["robustness.behind_text_gen"]["scorer"] == "exact_match:behind_4_words"
    found = summarise([{"post": scores}])["post"]
    assert found["robustness.true_false_likelier"]["n"] == 2 and all(score["protocol"] for score in found.values())


def test_robustness_does_not_depend_on_batches() -> None:
    lm, asked = build("llama"), [EditRequest("bo lives in", "lima", ground_truth="oslo"), EditRequest("a cat", "red")]
    wanted = Scores(robustness=True, prefix="the owl is blue", divergence=True)
    whole = quality(lm, asked, scores=wanted, batch_size=32, test_generation=True)
    for size in (1, 4):
        assert quality(lm, asked, scores=wanted, batch_size=size, test_generation=True) == whole
    assert [quality(lm, [each], scores=wanted, test_generation=True)[0] for each in asked] == whole


# --- long texts ----------------------------------------------------------------------------------------------------


def test_rouge_by_hand() -> None:
    found = rouge("the cat sat", "the cat sat on the mat")
    assert found["rouge1"] == pytest.approx(2 * (3 / 3) * (3 / 6) / (3 / 3 + 3 / 6))
    assert found["rouge2"] == pytest.approx(2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5))
    assert found["rougeL_recall"] == pytest.approx(0.5)
    assert rouge("Paris", "paris.") == {"rouge1": 1.0, "rouge2": None, "rougeL": 1.0, "rougeL_recall": 1.0}
    assert rouge("东京是首都", "东京是首都")["rouge2"] == 1.0, "a text without spaces has words too"
    assert set(rouge("x", "...").values()) == {None}
    assert rouge("", "a b")["rougeL"] == 0.0


def test_bleu() -> None:
    text = "the cat sat on the mat"
    assert bleu(text, text) == pytest.approx(1.0) and bleu("dogs bark", text) == pytest.approx(0.0, abs=0.1)
    assert bleu("东京是日本的首都", "东京是日本的首都") == pytest.approx(1.0)
    assert bleu("x", " . ") is None


@pytest.mark.parametrize(
    ("module", "call", "remedy"),
    [
        ("rouge_score", lambda: rouge("a", "b"), "pip install 'rouge-score'"),
        ("sacrebleu", lambda: bleu("a", "b"), "pip install 'sacrebleu'"),
        ("sentence_transformers", lambda: similarity(["a"], ["b"], "x"), "easyeditor[retrieval]"),
        ("lm_eval", lambda: capability(build("gpt2"), "mmlu"), "easyeditor[capability]"),
    ],
)
def test_what_is_not_installed_is_said(module: str, call: object, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra) as found:
        call()  # type: ignore[operator]
    assert remedy in str(found.value)


def test_long_answers_go_over_lines() -> None:
    lm, asked = build("gpt2"), request()
    scores = quality(lm, [asked], scores=Scores(texts=("rouge", "bleu"), text_tokens=5))[0]
    group = scores["text"]
    assert group["rewrite_gen_content"] == answer(lm, [asked.prompt], 5, one_line=False)
    assert group["rewrite_rouge1"] == [rouge(group["rewrite_gen_content"][0], asked.target_new)["rouge1"]]
    assert len(group["rephrase_bleu"]) == 2
    assert scores["metric_meta"]["text.rewrite_rouge1"]["scorer"] == "overlap:rouge1_first_5_tokens"
    assert summarise([{"post": scores}])["post"]["text.rephrase_rougeL"]["n"] == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"texts": ("meteor",)}, "no text score 'meteor'. Known: rouge, bleu, similarity"),
        ({"texts": ("similarity",)}, "needs 'encoder'"),
        ({"text_tokens": 0}, "at least one token"),
        ({"eval_metric": "f1"}, "eval_metric is 'f1'. Known: 'exact match'"),
        ({"evaluation_type": "vibes"}, "evaluation_type is 'vibes'. Known: 'LLM-judge', 'generate-text'"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("[", r"\[")):
        Scores(**wrong)  # type: ignore[arg-type]


def test_a_choice_of_scores_goes_into_a_file() -> None:
    assert json.loads(json.dumps(Scores(texts=("bleu",), prefix="x").to_dict()))["texts"] == ["bleu"]


# --- fluency, repetition, perplexity -------------------------------------------------------------------------------


def test_repetition_by_hand() -> None:
    assert repetition(["a b c d"]) == 0.0 and repetition(["a b c"]) is None
    assert repetition(["a a a a a a"]) == pytest.approx(1 - 1 / 3)
    assert repetition(["a b c d a b c d", "a b c d"]) == pytest.approx((1 - 4 / 5) / 2)


@pytest.mark.parametrize("family", ["gpt2", "chatglm"])
def test_drawn_texts_are_those_drawn_alone(family: str) -> None:
    lm, prompts = build(family), ["bo lives in", "a cat", "the capital of ada ra is"]
    alone = [sample(lm, [prompt], 12, seed=3)[0] for prompt in prompts]
    assert drawn(lm, prompts, 12, 3, batch_size=8) == drawn(lm, prompts, 12, 3, batch_size=1) == alone
    fluent = quality(lm, [EditRequest(p, "lima") for p in prompts], max_new_tokens=1, test_generation=True)
    text = sample(lm, [prompts[1]], 100, seed=0)
    assert fluent[1]["fluency"] == {"ngram_entropy": ngram_entropy(text), "repetition": repetition(text)}


def test_perplexity_against_the_plain_loss() -> None:
    lm, texts = build("llama"), ["the capital of ada ra is lima", "bo lives in new york . and then", "cat", "a red owl"]
    found = perplexity(lm, texts, batch_size=3)
    for text, value in zip(texts, found.texts, strict=True):
        ids = torch.tensor([lm.text.encode(text).ids])
        with torch.no_grad():
            loss = lm.model(ids, labels=ids).loss if ids.shape[1] > 1 else None
        assert value == (None if loss is None else pytest.approx(math.exp(float(loss)), rel=1e-4))
    said = found.to_dict()
    assert said["median"] == pytest.approx(np.median(found.scored)) and said["p95"] == pytest.approx(
        np.percentile(found.scored, 95)
    )
    assert said["n"] == len(found.scored) and said["n"] + said["unscored"] == 4
    assert perplexity(lm, texts, max_tokens=3, batch_size=1).texts != found.texts
    assert [len(row) for row in read_texts(lm, texts, 3)] == [2, 2, 1, 2]


def test_perplexity_of_files_and_bundled_text(tmp_path: Path) -> None:
    lm = build("gpt2")
    (tmp_path / "held.txt").write_text("bo lives in lima\n\na red cat is\n")
    assert len(perplexity(lm, tmp_path / "held.txt").texts) == 2
    assert len(perplexity(lm, texts=3, max_tokens=16).texts) == 3
    with pytest.raises(UsageError, match="There is no text in"):
        perplexity(lm, [])
    with pytest.raises(UsageError, match="encoder-decoder"):
        perplexity(build("t5"), ["a cat"])


def test_the_text_fits_the_model() -> None:
    table = TinyFacts()
    held = table.held_out_sentences()
    assert len(held) == len(set(held)) > 500 and not set(held) & set(table.sentences())
    assert fitting("tinyfacts") == "tinyfacts" and fitting("gpt2-xl") == "texts"
    lm = LM.load("tinyfacts")
    own, trained, prose = (
        perplexity(lm, source, texts=20).to_dict()["median"] for source in (None, table.sentences(), "texts")
    )
    assert own == perplexity(lm, held, texts=20).to_dict()["median"]
    assert trained < own < 10 < 1000 < prose, "prose says nothing of a model that knows no English"


def test_perplexity_is_not_clipped_and_broken_models_are_told() -> None:
    lm, texts = build("gpt2"), ["bo lives in lima", "a red cat is blue"]
    before = perplexity(lm, texts)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(2000.0)  # a model that is sure of the wrong things
    after = perplexity(lm, texts)
    assert max(after.scored or [math.inf]) > 10_000 or after.broken, "1,000 is no bound"
    assert "may have collapsed" in (alarm(Perplexity((3.0, 4.0), 0, 9), Perplexity((30.0, 4.0), 0, 9)) or "")
    assert alarm(before, before) is None
    gone = Perplexity((None, 2.0), 1, 256)
    assert "1 of 2 texts have no finite likelihood" in (alarm(before, gone) or "")
    assert gone.to_dict()["unscored"] == 1 and Perplexity((), 0, 256).to_dict()["median"] is None


def test_retention() -> None:
    after = [{"rewrite_gen": [1.0]}, {"rewrite_gen": [1.0]}, {"rewrite_gen": [0.0]}, {"rewrite_gen": [None]}, {}]
    later = [{"rewrite_gen": [1.0]}, {"rewrite_gen": [0.0]}, {"rewrite_gen": [1.0]}, {"rewrite_gen": [1.0]}, {}]
    assert retention(after, later) == [1.0, 0.0, None, None, None]
    assert retention([{"rephrase_gen": [1.0, 1.0]}], [{"rephrase_gen": [1.0, 0.0]}], "rephrase_gen") == [0.0]
    with pytest.raises(ValueError, match="shorter"):
        retention(after, later[:2])


# --- capability ----------------------------------------------------------------------------------------------------


PLACES = ["paris", "rome", "lima", "oslo"]
ROWS = [
    {"q": f"{name} lives in", "choices": PLACES, "gold": i % 4} for i, name in enumerate(["ada", "bo", "cy", "su"] * 3)
]


def own_task(folder: Path) -> None:
    """A task of the harness: multiple choice."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "places.yaml").write_text(
        f"task: places\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1\n"
    )


def right(lm: LM, rows: list[dict[str, Any]]) -> float:
    """The share of rows whose gold choice is the likeliest, by our own reading."""
    found = read(lm, [(row["q"], place) for row in rows for place in PLACES])
    best = [max(range(4), key=lambda i: found[row["q"], PLACES[i]].log_prob) for row in rows]
    return sum(i == row["gold"] for i, row in zip(best, rows, strict=True)) / len(rows)


def test_capability_of_the_edited_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own_task(tmp_path)
    lm = build("gpt2")
    pad = lm.tokenizer.pad_token
    found = capability(lm, "places", include_path=tmp_path, packaged=False)["places.acc"]
    assert found["mean"] == pytest.approx(right(lm, ROWS)) and found["n"] == 12
    assert "places_v1" in found["protocol"] and lm.tokenizer.pad_token == pad
    with applied(lm, shaken(lm, 30.0)):
        changed = capability(lm, ["places"], include_path=tmp_path, packaged=False, limit=10)["places.acc"]
        assert changed["mean"] == pytest.approx(right(lm, ROWS[:10])) and changed["n"] == 10
    assert changed["protocol"].endswith("first_10")
    with pytest.raises(UsageError, match="cannot run no_such_task"):
        capability(lm, "no_such_task", include_path=tmp_path, packaged=False)
    with pytest.raises(UsageError, match="No task was named"):
        capability(lm, [])
    lm.rewriters.append(lambda prompt: prompt)
    with pytest.raises(UsageError, match="the harness would not see it"):
        capability(lm, "places", include_path=tmp_path, packaged=False)
