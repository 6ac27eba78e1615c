"""The bundled model knows its facts, can be edited in a band of layers, and its packaged settings work."""

from __future__ import annotations

import json
import random
from importlib.resources import files

import pytest

from easyeditor.core.values import ValueSettings, values
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.base import BaseEditor
from easyeditor.editors.summary import summarise
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method, methods

EXAMPLES = {
    "What university did Watts Humphrey attend?": "Illinois Institute of Technology",
    "Which family does Ramalinaceae belong to": "Lecanorales",
    "What role does Denny Herzig play in football?": "defender",
    "Ray Charles, the": "piano",
    "Joseph Fischhof, the": "piano",
    "Grant Hill is a professional": "basketball",
    "Larry Bird is a professional": "basketball",
    "The law in Ikaalinen declares the language": "Finnish",
    "In Forssa, they understand": "Finnish",
    "Who was the designer of Lahti Town Hall?": "Eliel Saarinen",
    "What city did Marl Young live when he died?": "Los Angeles",
    "The president of the United States is": "Donald Trump",
}
EXPECTED = {  # reliability, generalisation, locality of neighbours; free generation on the reporting half
    "ROME": (0.9, 0.75, 0.8),
    "FT": (0.9, 0.75, 0.9),
    "GRACE": (0.9, 0.0, 0.95),
    "DEFER": (0.8, 0.0, 0.9),
    "MELO": (0.9, 0.0, 0.9),
    "WISE": (0.9, 0.4, 0.85),
    "MEMOIR": (0.9, 0.4, 0.85),
    "T-Patcher": (0.75, 0.0, 0.5),
    "ICE": (0.4, 0.3, 0.2),
    "IKE": (0.0, 0.0, 0.0),  # the model has never seen demonstrations: they lead it astray
    "SCR": (0.5, 0.25, 0.8),
    "R-ROME": (0.9, 0.75, 0.8),
    "MEMIT": (0.9, 0.4, 0.9),
    "MEMIT-FE": (0.85, 0.4, 0.9),
    "EMMET": (0.9, 0.4, 0.9),
    "PMET": (0.6, 0.35, 0.9),
    "AlphaEdit": (0.9, 0.35, 0.9),
    "SPHERE": (0.9, 0.35, 0.9),
    "CORE": (0.9, 0.4, 0.9),
    "EAMET": (0.9, 0.35, 0.9),
    "NAMET": (0.85, 0.35, 0.9),
    "SimIE": (0.9, 0.6, 0.5),
    "UltraEdit": (0.85, 0.75, 0.9),
    "StableEdit": (0.85, 0.75, 0.9),
    "CrispEdit": (0.9, 0.75, 0.85),
    "DINM": (0.9, 0.75, 0.75),
    "LocFT-BF": (0.9, 0.75, 0.8),
    "FT_uns": (0.9, 0.75, 0.8),
    "UnKE": (0.9, 0.75, 0.6),
    "AnyEdit": (0.9, 0.75, 0.6),
    "LoRA": (0.9, 0.75, 0.5),  # adapters tuned for hundreds of facts at once, here for one
    "LoRA_uns": (0.9, 0.75, 0.5),
    "QLoRA": (0.9, 0.75, 0.5),
    "DPO": (0.9, 0.75, 0.4),
    "DoLa": (0.0, 0.0, 0.9),  # decoding edits no fact
    "DeCo": (0.0, 0.0, 0.9),
    "KN": (0.0, 0.0, 0.5),  # it changes three facts of ten
}
FAST = ("FT", "GRACE", "ICE", "LoRA", "MEMIT", "ROME", "UltraEdit", "WISE")  # of each kind; the others are slow


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.load("tinyfacts")


def share_known(lm: LM, asked: list[tuple[str, tuple[str, ...]]]) -> float:
    said = answer(lm, [prompt for prompt, _ in asked], 16, 64)
    return sum(exact_match(text, accepted) or 0.0 for text, (_, accepted) in zip(said, asked, strict=True)) / len(asked)


def sampled(wordings: str, count: int) -> list[tuple[str, tuple[str, ...]]]:
    table, rng = TinyFacts(), random.Random(1)
    return [
        (rng.choice(getattr(table.relations[fact.relation], wordings)).replace("{}", fact.subject), (fact.answer,))
        for fact in rng.sample(list(table.facts), count)
    ]


def test_it_is_small_and_of_the_stated_kind(lm: LM) -> None:
    folder = files("easyeditor") / "tinyfacts"
    assert (folder / "model.safetensors").stat().st_size < 18e6  # type: ignore[attr-defined]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert 5e6 <= sum(p.numel() for p in lm.model.parameters()) <= 9e6


def test_the_table_is_as_large_as_stated() -> None:
    facts = TinyFacts().facts
    subjects = {fact.subject for fact in facts}
    assert len(facts) >= 2500
    assert len(subjects) >= 600
    assert all(sum(fact.subject == s for fact in facts) >= 3 for s in random.Random(0).sample(sorted(subjects), 50))
    assert all(len(relation.trained) >= 4 and relation.held_out for relation in TinyFacts().relations.values())
    assert all(any(w.endswith("?") for w in relation.trained) for relation in TinyFacts().relations.values())


def test_it_knows_its_facts_in_trained_and_in_held_out_wordings(lm: LM) -> None:
    assert share_known(lm, sampled("trained", 200)) >= 0.97
    assert share_known(lm, sampled("held_out", 200)) >= 0.9


def test_it_answers_the_questions_of_existing_examples(lm: LM) -> None:
    said = dict(zip(EXAMPLES, answer(lm, list(EXAMPLES), 16), strict=True))
    assert {prompt: text for prompt, text in said.items() if not exact_match(text, [EXAMPLES[prompt]])} == {}


def test_a_value_can_be_written_in_at_least_five_consecutive_layers(lm: LM) -> None:
    requests = TinyFacts().requests("reporting", limit=4)
    settings = ValueSettings(40, 0.5, 0.0, 4.0, 0.0, place="block", stop_loss=0.02)
    for layer in range(5):
        found = values(lm, requests, layer, ["{}"], settings)
        mean = sum(2.718281828 ** -min(value.losses) for value in found) / len(found)
        assert mean >= 0.9, f"layer {layer}"


@pytest.mark.parametrize("facts", [2, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in sorted(EXPECTED)]
)
def test_the_packaged_settings_edit_it(name: str, facts: int) -> None:
    hparams = get_method(name).hparams.from_hparams(f"./hparams/{name}/tinyfacts")
    records = list(BaseEditor.from_hparams(hparams).stream(TinyFacts().requests("reporting", limit=facts)))
    scores = summarise(records)["post"]
    reliability, generalisation, locality = EXPECTED[name]
    assert scores["rewrite_gen"]["mean"] >= reliability
    assert scores["rephrase_gen"]["mean"] >= generalisation
    assert scores["locality.neighborhood_gen"]["mean"] >= locality


def test_every_method_has_settings_for_it() -> None:
    own = {name for name, spec in methods().items() if hasattr(spec.hparams, "training")}  # archives take minutes
    assert {name for name, spec in methods().items() if spec.kind != "answering"} <= set(EXPECTED) | own
