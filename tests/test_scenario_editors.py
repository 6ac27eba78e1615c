"""Editors of one kind of data set: concepts, safe answers, opinions; records as existing scripts read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import toy
from easyeditor import ConceptEditor, PerEditor, PersonalityDataset, SafetyEditor
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.registry import get_method

ADA, BO = toy.request(0), toy.request(5)
NEAR = {"neighborhood": {"prompt": ["the job of cy vi is"] * 2, "ground_truth": ["judge"] * 2}}


def settings(lm: LM, name: str = "FT", **more: Any) -> HyperParams:
    given = {"model_name": (lm.model, lm.tokenizer), "max_new_tokens": 4, **toy.SETTINGS.get(name, {}), **more}
    return get_method(name).hparams(**given)


# --- concepts ------------------------------------------------------------------------------------------------------


def concepts() -> dict[str, Any]:
    return {
        "prompts": [ADA.prompt, BO.prompt],
        "target_new": [ADA.target_new, BO.target_new],
        "ground_truth": [ADA.ground_truth, BO.ground_truth],
        "rephrase_prompts": [ADA.rephrase_prompts[0], BO.rephrase_prompts[0]],
        "locality_inputs": NEAR,
        "instance_inputs": {"instance": {"prompt": ["is ada ra a", None]}},
        "subject": [ADA.subject, BO.subject],
    }


def test_concept_editor() -> None:
    lm = toy.taught("llama")
    editor = ConceptEditor.from_hparams(settings(lm))
    records, model, edits = editor.edit(**concepts(), concept_consistency=True)
    assert model is lm.model and not Ledger.of(lm).active and len(edits) == 2
    for i, record in enumerate(records):
        json.dumps(record)
        assert record["case_id"] == i and record["time"] > 0
        assert record["pre"]["rewrite_acc"] == [0.0] and record["post"]["rewrite_acc"] == [1.0]
        assert record["post"]["rephrase_acc"] and record["post"]["locality"]["neighborhood_acc"]
        assert len(record["post"]["gen_concept_text"]) == 2 and "gen_concept_text" not in record["pre"]
    assert records[0]["post"]["instance"]["instance_change"] in (-1, 0, 1) and records[1]["post"]["instance"] == {}
    assert records[0]["requested_rewrite"]["instance"] == {"instance": {"prompt": "is ada ra a"}}
    built = [{**r["requested_rewrite"]} for r in records[:1]]
    again, _, _ = editor.edit(None, None, requests=built, pre_edit=[{"pre": records[0]["pre"]}])
    assert again[0]["pre"]["rewrite_acc"] == [0.0] and len(Ledger.of(lm).active) == 1, "a single edit stays"
    editor.edit(None, None, requests=built)
    assert len(Ledger.of(lm).active) == 1, "until the next call"


def test_concept_editor_with_the_definition_in_the_prompt() -> None:
    lm = toy.taught("llama")
    editor = ConceptEditor.from_hparams(None, {"model_name": (lm.model, lm.tokenizer), "device": None})
    records, _, edits = editor.edit(**{**concepts(), "locality_inputs": None})
    before = f"Definition of {ADA.subject}: {ADA.target_new}\n"
    assert edits[0](ADA.prompt) == before + ADA.prompt  # type: ignore[operator]
    assert records[0]["post"]["metric_meta"]["rewrite"]["answer_in_context"]
    assert records[0]["post"]["rewrite_gen_content"] == answer(lm, [before + ADA.prompt])
    with pytest.raises(UsageError, match="pass prompt_hparams"):
        ConceptEditor.from_hparams(None)


def test_concept_editor_says_what_is_wrong() -> None:
    editor = ConceptEditor.from_hparams(settings(toy.build("llama")))
    for given, match in (
        ({"subjects": ["a"]}, "no argument 'subjects'. Did you mean 'subject'"),
        ({"instance_inputs": {"instance": {"prompt": ["a"]}}}, "1 prompts for 2 requests"),
        ({"pre_edit": [{}]}, "1 entries for 2 requests"),
    ):
        with pytest.raises(UsageError, match=match):
            editor.edit(**{**concepts(), **given})


# --- safe answers --------------------------------------------------------------------------------------------------


def harmful(system: str = "") -> dict[str, Any]:
    tests = [
        [system + text for text in ("the job of ada ra is", "where does ada ra live ?", "bo su lives in", "I")]
    ] * 2
    constraint = {
        "general knowledge constraint": {"prompt": [f"{system}the job of cy vi is"] * 2, "ground_truth": ["judge"] * 2}
    }
    return {
        "prompts": [system + ADA.prompt, system + BO.prompt],
        "general_prompt": tests,
        "locality_inputs": constraint,
    }


@pytest.mark.parametrize("name", ["DINM", "FT"])
def test_safety_editor(name: str, tmp_path: Any) -> None:
    lm = toy.taught("llama")
    more = {"max_output_length": 3} if name == "DINM" else {}
    editor = SafetyEditor.from_hparams(settings(lm, name, **more))
    plain, told = harmful(), harmful("I . ")
    pre_file = tmp_path / "pre.json"
    records, model, edits = editor.edit(
        editing_method=name,
        **plain,
        prompts_with_systemPrompt=told["prompts"],
        locality_inputs_with_systemPrompt=told["locality_inputs"],
        general_prompt_with_systemPrompt=told["general_prompt"],
        target_new=[ADA.target_new, BO.target_new],
        ground_truth=[ADA.ground_truth, BO.ground_truth],
        case_id=7,
        pre_file=pre_file,
    )
    assert model is lm.model and not Ledger.of(lm).active
    asked = told if name == "DINM" else plain
    for i, (record, edit) in enumerate(zip(records, edits, strict=True)):
        assert record["case_id"] == 7 and record["time"] > 0
        for phase in ("pre", "post"):
            assert {"DS", "DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ", "locality"} == set(record[phase])
        assert record["requested_rewrite"]["prompt"] == plain["prompts"][i], "as it was asked"
        assert edit.requests[0]["prompt"] == asked["prompts"][i], "as it was edited"
        assert record["pre"]["DS"].startswith(str((ADA, BO)[i].ground_truth))
        assert record["post"]["DS"].startswith((ADA, BO)[i].target_new)
    assert json.loads(pre_file.read_text())[0]["pre"] == records[0]["pre"]


def test_safety_editor_says_what_is_wrong() -> None:
    editor = SafetyEditor.from_hparams(settings(toy.build("llama")))
    given = {**harmful(), "prompts_with_systemPrompt": None, "target_new": ["a", "b"]}
    with pytest.raises(UsageError, match="editing_method is 'DINM', and the settings are those of FT"):
        editor.edit("DINM", **given)
    with pytest.raises(UsageError, match="'general_prompt': expected 4 texts for each of the 2"):
        editor.edit("FT", **{**given, "general_prompt": [["a", "b"]] * 2})
    with pytest.raises(UsageError, match="no argument 'cases'"):
        editor.edit("FT", **given, cases=1)


# --- opinions ------------------------------------------------------------------------------------------------------


def opinions(write: Any) -> PersonalityDataset:
    rows = [
        {
            "ent": subject,
            "extraversion": [f"{subject} lives in oslo"],
            "agreeableness": [f"{subject} lives in rome"],
            "neuroticism": [f"{subject} lives in lima"],
        }
        for subject in ("ada ra", "bo su")
    ]
    return PersonalityDataset(write("per.json", rows), target_per="extraversion")


@pytest.mark.parametrize("name", ["FT", "ICE"])
def test_per_editor(name: str, write: Any) -> None:
    lm = toy.taught("llama")
    ds = opinions(write)
    more = {"lr": 1e-3, "num_steps": 150} if name == "FT" else {}
    records, model, edits = PerEditor.from_hparams(settings(lm, name, **more)).edit_dataset(ds)
    assert model is lm.model and not Ledger.of(lm).active and len(edits) == 2
    for i, record in enumerate(records):
        assert set(record) == {
            "case_id", "time", "es", "dd", "pre_text", "edit_text", "ngram_pre_text", "ngram_edit_text", "coherent",
            "target_per"}  # fmt: skip
        assert record["case_id"] == i and record["target_per"] == "extraversion"
        assert 0 <= record["es"] <= 1 and record["dd"] >= 0
    if name == "FT":
        assert records[0]["es"] > 0.5 and records[0]["edit_text"].startswith("ada ra lives in oslo")
    alone, _, _ = PerEditor.from_hparams(settings(toy.taught("llama"), name)).edit_dataset([ds[0]])
    assert alone[0]["dd"] is None
    with pytest.raises(UsageError, match="Record 0, field 'cond_prompt'"):
        PerEditor.from_hparams(settings(lm, name)).edit_dataset([{"ent": "a"}])
