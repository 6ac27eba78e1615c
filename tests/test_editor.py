"""`BaseEditor`: what comes back is what was edited, what was measured when, and what is refused beforehand."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import easyeditor
import toy
from easyeditor import BaseEditor, FTHyperParams, GraceHyperParams, IKEHyperParams, Ledger, ROMEHyperParams, summarise
from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import applied
from easyeditor.errors import EditDidNothing, UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.registry import methods
from easyeditor.requests import EditRequest, Probe

OWN = {
    "FT": {"batch_size": 2},
    "GRACE": {"inner_params": ["model.layers[2].mlp.down_proj.weight"]},
    "UltraEdit": {"lr": 1e-2},
    "IKE": {"use_icl_examples": False},  # what a training set does: tests/test_retrieval.py
}
QUICK = {
    name: {**values, **({"mom2_adjustment": False} if "mom2_adjustment" in values else {}), **OWN.get(name, {})}
    for name, values in toy.SETTINGS.items()
}
# A text in front of the prompt tells one fact; a change normalised by its own statistics is as large as one of many.
ALONE = ("ICE", "IKE", "StableEdit")
EDITING = [
    pytest.param(name, marks=() if name in (*toy.ON_ALL, *toy.ON_TWO) else pytest.mark.slow)
    for name, spec in sorted(methods().items())
    if spec.kind not in ("decoding", "answering")
]
PROBE = {"neighborhood": {"prompt": ["the home of cy to is"] * 3, "ground_truth": ["oslo"] * 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that is never to be loaded."""
    return str(tmp_path_factory.mktemp("model"))


def settings(name: str, lm: LM | str | None = None, **more: Any) -> HyperParams:
    model = lm if isinstance(lm, str) else (lm.model, lm.tokenizer) if lm else "tinyfacts"
    return methods()[name].hparams(**{"model_name": model, "max_new_tokens": 4, **QUICK.get(name, {}), **more})


def editor(name: str = "FT", lm: LM | None = None, **more: Any) -> BaseEditor:
    lm = lm or toy.taught("llama")
    known = methods()[name].hparams.__dataclass_fields__
    trained = {"archive": toy.archive(lm, name)} if "archive" in known else {}
    return BaseEditor.from_hparams(settings(name, lm, **trained, **more))


def quick(**more: Any) -> BaseEditor:
    """An editor that changes something within a moment, on a model that knows nothing."""
    return editor("FT", toy.build("llama"), **{"lr": 1e-2, "num_steps": 3, **more})


def lists(*requests: EditRequest) -> dict[str, Any]:
    return {
        "prompts": [r.prompt for r in requests],
        "target_new": [r.target_new for r in requests],
        "ground_truth": [r.ground_truth for r in requests],
        "target_neg": [r.target_neg for r in requests],
        "rephrase_prompts": [list(r.rephrase_prompts) for r in requests],
        "subject": [r.subject for r in requests],
        "loc_prompts": [r.loc_prompt for r in requests],
        "locality_inputs": {
            "neighborhood": {
                "prompt": [[p.prompt for p in r.locality["neighborhood"]] for r in requests],
                "ground_truth": [[p.answers[0] for p in r.locality["neighborhood"]] for r in requests],
            }
        },
    }


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return before.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def bare(record: Any) -> Any:
    """A record without what depends on the clock."""
    return {key: value for key, value in record.items() if key != "time"}


HOME, JOB, THIRD = toy.request(0), toy.request(5, "job"), toy.request(10)


# ---- what it looks like


def test_the_signatures_are_the_known_ones() -> None:
    known = ["prompts", "target_new", "ground_truth", "target_neg", "rephrase_prompts", "locality_inputs",
             "portability_inputs", "sequential_edit", "verbose", "kwargs"]  # fmt: skip
    for call in (BaseEditor.edit, BaseEditor.batch_edit, BaseEditor.generate_edit):
        assert list(inspect.signature(call).parameters)[1:] == known
        assert inspect.signature(call).parameters["sequential_edit"].default is False
        assert inspect.signature(call).parameters["verbose"].default is True
    assert list(inspect.signature(BaseEditor.edit_requests).parameters)[1:5] == [
        "requests", "sequential_edit", "verbose", "test_generation"]  # fmt: skip
    assert list(inspect.signature(BaseEditor.normal_edit).parameters)[1:4] == [
        "prompts", "target_new", "sequential_edit"]  # fmt: skip


def test_the_known_names_import() -> None:
    assert [cls.alg_name for cls in (ROMEHyperParams, FTHyperParams, GraceHyperParams, IKEHyperParams)] == [
        "ROME", "FT", "GRACE", "IKE"]  # fmt: skip
    for name in ("apply_rome_to_model", "apply_ft_to_model", "apply_grace_to_model", "apply_ike_to_model"):
        known = ["model", "tok", "requests", "hparams", "copy", "return_orig_weights", "keep_original_weight", "kwargs"]
        assert list(inspect.signature(getattr(easyeditor, name)).parameters) == known
    with pytest.raises(AttributeError, match="no attribute 'apply_memo_to_model'"):
        _ = easyeditor.apply_memo_to_model


def test_an_editor_has_the_known_attributes() -> None:
    one = quick()
    assert (one.alg_name, one.hparams.alg_name) == ("FT", "FT")
    assert one.model is one.lm.model
    assert one.tok is one.lm.tokenizer
    assert callable(one.apply_algo)
    assert str(one.device) == "cpu"
    with pytest.raises(UsageError, match="takes settings"):
        BaseEditor.from_hparams("ROME/gpt2-xl")  # type: ignore[arg-type]


def test_the_record_is_laid_out_as_known() -> None:
    one = quick()
    portability = {"one_hop": {"prompt": ["ada ra works as", None], "ground_truth": ["clown", None]}}
    records, model, edits = one.edit(
        **{**lists(HOME, JOB), "loc_prompts": ["a new fact"]}, portability_inputs=portability, test_generation=True
    )
    assert model is one.model
    assert all(isinstance(edit, Edit) for edit in edits)
    assert [r["case_id"] for r in records] == [0, 1]
    for record, request, edit in zip(records, (HOME, JOB), edits, strict=True):
        assert set(record) == {"pre", "post", "case_id", "requested_rewrite", "time", "edit_id"}
        assert record["edit_id"] == edit.id
        assert record["time"] > 0
        asked = record["requested_rewrite"]
        assert (asked["prompt"], asked["target_new"]) == (request.prompt, request.target_new)
        assert (asked["subject"], asked["ground_truth"]) == (request.subject, request.ground_truth)
        assert asked["loc_prompt"] == "a new fact"
        assert EditRequest.from_dict(asked).to_dict() == asked
        for phase in ("pre", "post"):
            found = record[phase]
            assert len(found["rewrite_acc"]) == len(found["rewrite_gen"]) == 1
            assert len(found["rephrase_acc"]) == 2
            assert len(found["locality"]["neighborhood_output"]) == 4
            assert set(found["fluency"]) == {"ngram_entropy", "repetition"}
            assert {"rewrite", "rephrase"} <= set(found["metric_meta"])
            for meta in found["metric_meta"].values():
                assert {"result_key", "protocol", "scorer", "comparable_group"} <= set(meta)
        assert "neighborhood_acc" not in record["pre"]["locality"]
        assert len(record["post"]["locality"]["neighborhood_acc"]) == 4
        assert "locality.neighborhood" in record["post"]["metric_meta"]
    assert len(records[0]["post"]["portability"]["one_hop_acc"]) == 1
    assert records[1]["post"]["portability"] == {}, "None means no probe"
    json.dumps(records)


def test_one_text_is_a_list_of_one() -> None:
    records, _, edits = quick().edit("the home of ada ra is", "rome", verbose=False)
    assert (len(records), len(edits)) == (1, 1)


def test_fluency_is_measured_only_when_asked() -> None:
    records, _, _ = quick().edit_requests([HOME])
    assert "fluency" not in records[0]["pre"]
    assert "fluency" not in records[0]["post"]


# ---- what comes back


@pytest.mark.parametrize("name", EDITING)
def test_one_request_and_the_returned_model_carries_it(name: str) -> None:
    lm = toy.taught("llama")
    one = editor(name, lm)
    assert one.ask(HOME.prompt) == [HOME.ground_truth]
    before = bits(one.model)
    records, model, (edit,) = one.edit(**lists(HOME))
    assert model is one.model is lm.model
    assert one.ask(HOME.prompt) == [HOME.target_new]
    assert [e.id for e in Ledger.of(one.lm).active] == [edit.id]
    (record,) = records
    assert (record["pre"]["rewrite_gen"], record["post"]["rewrite_gen"]) == ([0.0], [1.0])
    assert (record["pre"]["rewrite_gen_content"], record["post"]["rewrite_gen_content"]) == (
        [HOME.ground_truth], [HOME.target_new])  # fmt: skip
    assert "final" not in record
    with pytest.raises(UsageError, match=r"'nobody'.*Edits on it: " + edit.id):
        one.rollback("nobody")
    for key in (edit.id, HOME.target_new, edit):
        assert one.rollback(key) == [edit]
        assert same_bits(one.model, before)
        assert one.ask(HOME.prompt) == [HOME.ground_truth]
        Ledger.of(one.lm).apply(edit)
    one.rollback(edit)
    with pytest.raises(UsageError, match="Edits on it: none"):
        one.rollback(edit.id)


@pytest.mark.parametrize("name", EDITING)
def test_several_requests_and_the_returned_model_is_pristine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    one = editor(name)
    before = bits(one.model)
    with caplog.at_level(logging.WARNING):
        records, model, edits = one.edit(**lists(HOME, JOB))
    assert "2 edits were each made on the pristine model and taken back" in caplog.text
    assert "sequential_edit=True" in caplog.text
    assert same_bits(model, before)
    assert not Ledger.of(one.lm).active
    assert one.ask([HOME.prompt, JOB.prompt]) == [HOME.ground_truth, JOB.ground_truth]
    assert [r["post"]["rewrite_gen"] for r in records] == [[1.0], [1.0]]
    assert not any("final" in r for r in records)
    for edit in edits:
        Ledger.of(one.lm).apply(edit)
    if name not in ALONE:
        assert one.ask([HOME.prompt, JOB.prompt]) == [HOME.target_new, JOB.target_new]


@pytest.mark.parametrize("name", ["FT", "GRACE", "ROME"])
def test_in_sequence_all_stay(name: str) -> None:
    one = editor(name)
    records, _, edits = one.edit(**lists(HOME, JOB, THIRD), sequential_edit=True)
    assert Ledger.of(one.lm).active == edits
    asked = [HOME, JOB, THIRD]
    assert one.ask([r.prompt for r in asked]) == [r.target_new for r in asked]
    said = one.ask([p.prompt for p in HOME.locality["neighborhood"]])
    for record in records:
        assert record["post"]["rewrite_gen"] == record["final"]["rewrite_gen"] == [1.0]
        assert "neighborhood_acc" in record["final"]["locality"]
    assert records[0]["final"]["locality"]["neighborhood_gen_content"] == said
    one.rollback(JOB.target_new)
    assert len(Ledger.of(one.lm).active) == 2


def test_before_means_before_the_first_edit() -> None:
    """A neighbour that the first edit moves is counted against the second one too."""
    asked = dataclasses.replace(JOB, locality={"moved": (Probe(HOME.prompt, (HOME.ground_truth,)),)})
    one = editor("FT")
    records, _, _ = one.edit_requests([HOME, asked], sequential_edit=True)
    second = records[1]
    assert second["pre"]["locality"]["moved_gen_content"] == [HOME.ground_truth]
    assert second["post"]["locality"]["moved_gen_content"] == [HOME.target_new]
    assert second["post"]["locality"]["moved_gen"] == [0.0]
    assert second["pre"]["rewrite_gen_content"] == [JOB.ground_truth]


def test_a_later_call_takes_back_what_an_earlier_one_left() -> None:
    one = quick()
    before = bits(one.model)
    _, _, (first,) = one.edit_requests([HOME])
    records, _, (second,) = one.edit_requests([JOB])
    assert Ledger.of(one.lm).active == [second]
    alone, _, (same,) = quick().edit_requests([JOB])
    assert same == second
    assert bare(alone[0]) == bare(records[0])
    one.edit_requests([HOME, JOB])
    assert same_bits(one.model, before)
    assert first != second


def test_what_was_taken_back_by_hand_does_not_disturb_a_later_call() -> None:
    one = quick()
    for undo in (one.rollback, Ledger.of(one.lm).undo, lambda _: Ledger.of(one.lm).reset()):
        _, _, (edit,) = one.edit_requests([HOME])
        undo(edit.id)
    one.edit_requests([HOME])
    assert len(Ledger.of(one.lm).active) == 1


def test_what_a_sequence_left_stays() -> None:
    one = quick()
    _, _, kept = one.edit_requests([HOME, JOB], sequential_edit=True)
    _, _, (third,) = one.edit_requests([THIRD])
    assert Ledger.of(one.lm).active == [*kept, third]
    one.edit_requests([THIRD])
    assert len(Ledger.of(one.lm).active) == 3
    _, _, (normal,) = one.normal_edit([HOME.prompt], ["cairo"], sequential_edit=True)
    one.edit_requests([JOB])
    assert normal in Ledger.of(one.lm).active


def test_two_editors_side_by_side_do_as_two_alone() -> None:
    first, second = quick(), editor("GRACE", toy.build("llama", seed=4), n_iter=3)
    together = [one.edit_requests([r], sequential_edit=True) for r in (HOME, JOB) for one in (first, second)]
    alone_first, alone_second = quick(), editor("GRACE", toy.build("llama", seed=4), n_iter=3)
    alone = [alone_first.edit_requests([r], sequential_edit=True) for r in (HOME, JOB)]
    alone += [alone_second.edit_requests([r], sequential_edit=True) for r in (HOME, JOB)]
    for i, j in ((0, 0), (2, 1), (1, 2), (3, 3)):
        assert bare(together[i][0][0]) == bare(alone[j][0][0])
        assert together[i][2] == alone[j][2]
    assert same_bits(first.model, bits(alone_first.model))
    assert same_bits(second.model, bits(alone_second.model))


def test_changed_settings_count_from_the_next_call() -> None:
    one = quick()
    _, _, (slow,) = one.edit_requests([HOME])
    one.hparams.lr = 2e-3
    _, _, (fast,) = one.edit_requests([HOME])
    assert fast.settings["lr"] == 2e-3
    assert fast == quick(lr=2e-3).edit_requests([HOME])[2][0] != slow


# ---- other calls


def test_a_batch_is_one_edit_per_chunk() -> None:
    one = editor("FT", batch_size=2)
    before = bits(one.model)
    records, _, edits = one.batch_edit(**lists(HOME, JOB, THIRD))
    assert [len(edit.requests) for edit in edits] == [2, 1]
    assert same_bits(one.model, before)
    assert [r["case_id"] for r in records] == [0, 1, 2]
    assert records[0]["time"] == records[1]["time"] != records[2]["time"]
    assert records[0]["edit_id"] == records[1]["edit_id"] != records[2]["edit_id"]
    assert [r["post"]["rewrite_gen"] for r in records] == [[1.0]] * 3
    assert [r["final"]["rewrite_gen"] for r in records] == [[0.0]] * 3, "the returned model is pristine"
    records, _, edits = one.batch_edit(**lists(HOME, JOB, THIRD), sequential_edit=True)
    assert Ledger.of(one.lm).active == edits
    assert [r["final"]["rewrite_gen"] for r in records] == [[1.0]] * 3
    again, _, (edit,) = editor("FT", batch_size=8).batch_edit(**lists(HOME, JOB, THIRD))
    assert len(edit.requests) == 3
    assert [r["final"]["rewrite_gen"] for r in again] == [[1.0]] * 3, "a single chunk stays"


def test_normal_edit_measures_nothing_and_keeps_the_edit() -> None:
    one = quick()
    none, model, (edit,) = one.normal_edit([HOME.prompt, JOB.prompt], [HOME.target_new, JOB.target_new])
    assert none is None
    assert model is one.model
    assert Ledger.of(one.lm).active == [edit]
    assert edit.targets == [HOME.target_new, JOB.target_new]
    one.normal_edit([THIRD.prompt], [THIRD.target_new])
    assert len(Ledger.of(one.lm).active) == 1


@pytest.mark.parametrize("name", ["ROME", "GRACE"])
def test_one_at_a_time_methods_take_no_batch(name: str, folder: str) -> None:
    one = BaseEditor.from_hparams(settings(name, folder))
    for call in (one.batch_edit, one.normal_edit):
        with pytest.raises(UsageError, match=rf"{name} makes one edit per request.*sequential_edit=True"):
            call([HOME.prompt], [HOME.target_new], subject=[HOME.subject])
    assert one._lm is None


def test_generate_edit_gives_texts() -> None:
    one = editor("FT")
    portability = {"por_hop": {"prompt": ["ada ra works as"], "ground_truth": ["pilot"]}}
    (record,), _, _ = one.generate_edit(**lists(HOME), portability_inputs=portability)
    assert record["pre"]["rewrite_ans"] == [HOME.ground_truth]
    assert record["post"]["rewrite_ans"] == [HOME.target_new]
    assert len(record["post"]["rephrase_ans"]) == 2
    assert len(record["post"]["locality_ans"]) == 4
    assert record["pre"]["portability_ans"] == [toy.TRUTH["job", "ada ra"]]
    assert set(record["post"]) - set(record["pre"]) == {"fluency"}
    assert {"case_id", "requested_rewrite"} <= set(record)


def test_swapping_the_ground_truth_leaves_the_generated_texts_as_they_are() -> None:
    """Nothing that is generated knows the gold answer or its length."""
    asked = lists(HOME, JOB)
    one, two = quick(), quick()
    records, _, edits = one.edit(**asked)
    swapped = {**asked, "ground_truth": ["a new fact and then some", None]}
    swapped["locality_inputs"] = {"neighborhood": {**asked["locality_inputs"]["neighborhood"], "ground_truth": None}}
    others, _, same = two.edit(**swapped)
    assert edits == same
    for a, b in zip(records, others, strict=True):
        for phase in ("pre", "post"):
            for key in ("rewrite_gen_content", "rephrase_gen_content", "rewrite_acc", "rewrite_gen"):
                assert a[phase][key] == b[phase][key]
            texts = (found[phase]["locality"]["neighborhood_gen_content"] for found in (a, b))
            assert next(texts) == next(texts)


def test_measurements_made_before_are_used_and_written(tmp_path: Path) -> None:
    asked, file = lists(HOME, JOB), tmp_path / "deep" / "pre.json"
    first, _, _ = quick().edit(**asked, pre_file=str(file))
    written = json.loads(file.read_text())
    assert [p.name for p in file.parent.iterdir()] == ["pre.json"]
    assert [entry["pre"] for entry in written] == [record["pre"] for record in first]
    again, _, _ = quick().edit(**asked, pre_edit=written)
    assert [bare(a) for a in again] == [bare(b) for b in first]
    written[0]["pre"]["rewrite_acc"] = [0.123]
    marked, _, _ = quick().edit(**asked, pre_edit=written)
    assert marked[0]["pre"]["rewrite_acc"] == [0.123], "it was not measured again"


def test_measurements_of_other_requests_are_refused(folder: str) -> None:
    one = BaseEditor.from_hparams(settings("FT", folder))
    with pytest.raises(UsageError, match="'pre_edit' has 1 entries for 2 requests"):
        one.edit(**lists(HOME, JOB), pre_edit=[{"pre": {"rewrite_acc": [1.0], "locality": {}}}])
    with pytest.raises(UsageError, match=r"'pre_edit', entry 0, is no measurement"):
        one.edit(**lists(HOME), pre_edit=[{"rewrite_acc": [1.0]}])
    assert one._lm is None


def test_a_place_for_the_measurements_is_checked_first(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    one = BaseEditor.from_hparams(settings("FT", folder))
    for place in (tmp_path / "file" / "pre.json", tmp_path):
        with pytest.raises(UsageError, match="cannot be written"):
            one.edit(**lists(HOME), pre_file=str(place))
    assert one._lm is None


def test_records_keep_the_number_that_a_request_has() -> None:
    records, _, _ = quick().edit_requests([dataclasses.replace(HOME, case_id=7), JOB])
    assert [record["case_id"] for record in records] == [7, 1]


def test_a_stream_that_is_left_early_leaves_nothing() -> None:
    one = quick()
    before = bits(one.model)
    stream = one.stream([HOME, JOB, THIRD])
    assert next(stream)["case_id"] == 0
    stream.close()
    assert same_bits(one.model, before)
    assert not Ledger.of(one.lm).active


def test_all_edits_of_one_answer_are_rolled_back_together() -> None:
    one = quick()
    before = bits(one.model)
    one.edit_requests([HOME, JOB, dataclasses.replace(THIRD, target_new=HOME.target_new)], sequential_edit=True)
    assert len(one.rollback(HOME.target_new)) == 2
    assert [edit.targets for edit in Ledger.of(one.lm).active] == [[JOB.target_new]]
    one.rollback(JOB.target_new)
    assert same_bits(one.model, before)


def test_order_and_company_change_no_record() -> None:
    """Non-sequential records are independent of each other."""
    requests = [HOME, JOB, THIRD, toy.request(3, "job")]
    records, _, edits = quick().edit_requests(requests)
    backwards, _, back = quick().edit_requests(requests[::-1])
    for i, record in enumerate(records):
        other = backwards[len(records) - 1 - i]
        assert edits[i] == back[len(records) - 1 - i]
        assert {**bare(other), "case_id": i} == bare(record)
    alone, _, _ = quick().edit_requests(requests[2:3])
    assert {**bare(alone[0]), "case_id": 2} == bare(records[2])


def test_the_summary_of_records() -> None:
    records, _, _ = editor("FT").edit(**lists(HOME, JOB), sequential_edit=True)
    summary = summarise(records)
    assert set(summary) == {"pre", "post", "final"}
    score = summary["post"]["rewrite_gen"]
    assert (score["mean"], score["n"], score["stderr"], score["unscored"]) == (1.0, 2, 0.0, 0)
    assert summary["pre"]["rewrite_gen"]["mean"] == 0.0
    assert summary["post"]["locality.neighborhood_acc"]["n"] == 8
    assert "free_generation" in score["protocol"]
    assert easyeditor.summary_metrics(records[0])["post"]["rewrite_gen"]["stderr"] is None
    ice, _, _ = editor("ICE").edit(**lists(HOME))
    assert ice[0]["post"]["metric_meta"]["rewrite_gen"]["answer_in_context"]
    with pytest.raises(UsageError, match="different protocols"):
        summarise([*records, *ice])


def test_through_the_chat_template() -> None:
    lm = toy.build("llama")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}then : {{ m['content'] }} ?{% endfor %}"
    chat = LM.wrap(lm.model, tokenizer)
    for name in ("ROME", "FT", "GRACE"):
        more = {"lr": 1e-2, "num_steps": 3} if name == "FT" else {}
        one = editor(name, chat, use_chat_template=True, **more)
        records, _, (edit,) = one.edit(**lists(HOME))
        assert one.lm.rewrite("x") == "<s>then : x ?"
        assert one.lm.text.encode(one.lm.rewrite(HOME.prompt)).ids.count(1) == 1
        for meta in records[0]["post"]["metric_meta"].values():
            assert "chat_template" in meta["protocol"]
        plain = editor(name, toy.build("llama"), **more).edit(**lists(HOME))[2][0]
        assert edit != plain, "the fact was edited inside the template"
        one.rollback(edit)
    without = editor("FT", toy.build("llama"), use_chat_template=True)
    with pytest.raises(UsageError, match="no chat template"):
        without.edit_requests([HOME])


# ---- what is refused, and when


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty target": ({"prompts": ["a b", "a c"], "target_new": ["x", "  "], "subject": ["a", "a"]},
                     r"Record 1, field 'target_new': it is empty. Give"),
    "empty prompt": ({"prompts": ["", "a c"], "target_new": ["x", "y"], "subject": ["a", "a"]},
                     r"Record 0, field 'prompt': it is empty. Give"),
    "target that is no text": ({"prompts": ["a b"], "target_new": [3], "subject": ["a"]},
                               r"Record 0, field 'target_new': expected a text, got 3"),
    "missing subject": ({"prompts": ["a b"], "target_new": ["x"]},
                        r"Record 0, field 'subject': ROME needs it and it is missing. Add"),
    "one missing subject": ({"prompts": ["a b", "c d"], "target_new": ["x", "y"], "subject": ["a", None]},
                            r"Record 1, field 'subject': ROME needs it"),
    "subject elsewhere": ({"prompts": ["a b"], "target_new": ["x"], "subject": ["z"]},
                          r"Record 0, field 'subject': 'z' does not occur in the prompt 'a b'. Copy"),
    "fewer targets": ({"prompts": ["a b", "a c"], "target_new": ["x"], "subject": ["a", "a"]},
                      r"'target_new' has 1 entries and 'prompts' has 2. Give one entry per prompt"),
    "fewer subjects": ({"prompts": ["a b", "a c"], "target_new": ["x", "y"], "subject": ["a"]},
                       r"'subject' has 1 entries and 'prompts' has 2"),
    "more old answers": ({"prompts": ["a b"], "target_new": ["x"], "ground_truth": ["u", "v"], "subject": ["a"]},
                         r"'ground_truth' has 2 entries and 'prompts' has 1"),
    "fewer rephrasings": ({"prompts": ["a b", "a c"], "target_new": ["x", "y"], "rephrase_prompts": ["r"],
                           "subject": ["a", "a"]}, r"'rephrase_prompts' has 1 entries"),
    "fewer probes": ({"prompts": ["a b", "a c"], "target_new": ["x", "y"], "subject": ["a", "a"],
                      "locality_inputs": {"near": {"prompt": ["p"], "ground_truth": ["q"]}}},
                     r"'locality_inputs.near.prompt' has 1 entries"),
    "probes without prompts": ({"prompts": ["a b"], "target_new": ["x"], "subject": ["a"],
                                "portability_inputs": {"hop": {"ground_truth": ["q"]}}},
                               r"'portability_inputs.hop'.*Add 'prompt'"),
    "nothing": ({"prompts": [], "target_new": []}, r"nothing to edit.*Give at least one"),
    "two wishes": ({"prompts": ["a b"], "target_new": ["x"], "subject": ["a"], "keep_original_weight": True,
                    "sequential_edit": True}, r"keep_original_weight=True and sequential_edit=True contradict"),
    "demonstrations": ({"prompts": ["a b"], "target_new": ["x"], "subject": ["a"], "train_ds": [1]}, "train_ds"),
    "another score": ({"prompts": ["a b"], "target_new": ["x"], "subject": ["a"], "eval_metric": "bleurt"},
                      "eval_metric is 'bleurt'"),
    "odd request": ({"prompts": [], "target_new": [], "requests": [{"prompt": "b", "target_new": "x", "subjct": "b"}]},
                    r"Record 0: unknown field 'subjct'. Did you mean 'subject'"),
    "request without target": ({"prompts": [], "target_new": [], "requests": [{"prompt": "a b"}]},
                               r"Record 0, field 'target_new': it is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_a_model_is_loaded(case: str, folder: str) -> None:
    arguments, said = BAD[case]
    one = BaseEditor.from_hparams(settings("ROME", folder))
    with pytest.raises(UsageError, match=said):
        one.edit(**arguments)
    assert one._lm is None


@pytest.mark.parametrize("call", ["edit", "batch_edit", "generate_edit", "normal_edit", "edit_requests"])
def test_unknown_arguments_are_type_errors(call: str, folder: str) -> None:
    one = BaseEditor.from_hparams(settings("FT", folder))
    first = ([HOME],) if call == "edit_requests" else ([HOME.prompt], [HOME.target_new])
    with pytest.raises(TypeError, match=rf"{call}\(\) has no argument 'sequental_edit'"):
        getattr(one, call)(*first, sequental_edit=True)
    with pytest.raises(TypeError, match="Did you mean 'subject'" if call != "edit_requests" else "subjects"):
        getattr(one, call)(*first, subjects=["a"])
    assert one._lm is None


@pytest.mark.parametrize("call", ["edit", "batch_edit", "generate_edit"])
def test_contradictions_are_refused_by_every_call(call: str, folder: str) -> None:
    one = BaseEditor.from_hparams(settings("FT", folder))
    with pytest.raises(UsageError, match="contradict"):
        getattr(one, call)([HOME.prompt], [HOME.target_new], sequential_edit=True, keep_original_weight=True)
    assert one._lm is None


def test_a_model_folder_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"no model folder './nowhere/at/all'.*tinyfacts"):
        BaseEditor.from_hparams(settings("FT", "./nowhere/at/all"))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_edit_that_does_nothing_is_an_error_and_undone(sequential: bool) -> None:
    one = quick(lr=0.0)
    before = bits(one.model)
    with pytest.raises(EditDidNothing, match=f"FT changed nothing for '{HOME.prompt}' -> '{HOME.target_new}'"):
        one.edit_requests([HOME], sequential_edit=sequential)
    assert same_bits(one.model, before)
    assert not Ledger.of(one.lm).active
    one.hparams.lr = 1e-2
    one.edit_requests([HOME], sequential_edit=sequential)
    assert len(Ledger.of(one.lm).active) == 1, "the editor can be used again"


def test_a_failure_in_a_sequence_leaves_the_edits_before_it() -> None:
    one = quick()
    _, _, (first,) = one.edit_requests([HOME], sequential_edit=True)
    held = bits(one.model)
    one.hparams.lr = 0.0
    with pytest.raises(EditDidNothing):
        one.edit_requests([JOB], sequential_edit=True)
    assert Ledger.of(one.lm).active == [first]
    assert same_bits(one.model, held)


# ---- the functions of existing scripts


@pytest.mark.parametrize("name", ["ROME", "FT"])
def test_apply_to_model_changes_the_model_and_returns_its_weights(name: str) -> None:
    lm = toy.taught("llama")
    before, call = bits(lm.model), getattr(easyeditor, f"apply_{name.lower()}_to_model")
    hparams = settings(name, "tinyfacts")
    model, kept = call(lm.model, lm.tokenizer, [HOME.to_dict()], hparams, copy=True, return_orig_weights=True)
    assert model is not lm.model
    assert same_bits(lm.model, before), "copy=True leaves the model alone"
    assert answer(LM.wrap(model, lm.tokenizer), [HOME.prompt], 4) == [HOME.target_new]
    model, kept = call(lm.model, lm.tokenizer, HOME.to_dict(), hparams, return_orig_weights=True)
    assert model is lm.model
    assert set(kept) == {lm.weight_name(1)}
    assert answer(lm, [HOME.prompt], 4) == [HOME.target_new]
    with torch.no_grad():
        for weight, old in kept.items():
            model.get_parameter(weight).copy_(old)
    assert same_bits(lm.model, before)
    assert call(lm.model, lm.tokenizer, [HOME], hparams)[1] == {}


def test_apply_to_model_of_what_changes_no_weight() -> None:
    lm = toy.taught("llama")
    before = bits(lm.model)
    model, undo = easyeditor.apply_grace_to_model(lm.model, lm.tokenizer, [HOME], settings("GRACE"), copy=False)
    assert same_bits(model, before)
    assert answer(lm, [HOME.prompt], 4) == [HOME.target_new]
    undo()
    assert answer(lm, [HOME.prompt], 4) == [HOME.ground_truth]
    assert not any(module._forward_hooks for module in lm.model.modules())
    model, undo = easyeditor.apply_ike_to_model(lm.model, lm.tokenizer, [HOME], settings("ICE"))
    assert model is lm.model
    assert lm.rewrite(HOME.prompt).startswith("New Fact: "), "all who wrap the model see its edits"
    undo()
    assert lm.rewrite(HOME.prompt) == HOME.prompt
    with pytest.raises(TypeError, match=r"'return_orig_weight'.*Did you mean"):
        easyeditor.apply_rome_to_model(lm.model, lm.tokenizer, [HOME], settings("ROME"), return_orig_weight=True)
    with pytest.raises(UsageError, match="field 'subject'"):
        easyeditor.apply_rome_to_model(lm.model, lm.tokenizer, [{"prompt": "a", "target_new": "b"}], settings("ROME"))


def test_execute_returns_the_change_and_leaves_the_model() -> None:
    lm = toy.taught("llama")
    before, weight = bits(lm.model), lm.weight_name(1)
    pair = easyeditor.execute_rome(lm.model, lm.tokenizer, HOME.to_dict(), settings("ROME", "tinyfacts"))
    assert list(pair) == [weight]
    change = torch.outer(*pair[weight])
    whole = easyeditor.execute_ft(lm.model, lm.tokenizer, [HOME], settings("FT", "tinyfacts"))[weight]
    assert same_bits(lm.model, before)
    for each in (change, whole):
        with torch.no_grad():
            lm.model.get_parameter(weight).add_(each.to(lm.dtype))
        assert answer(lm, [HOME.prompt], 4) == [HOME.target_new]
        lm.model.load_state_dict(before)
    with pytest.raises(UsageError, match=r"GRACE changes no weight.*apply_grace_to_model"):
        easyeditor.execute_grace(lm.model, lm.tokenizer, [HOME], settings("GRACE"))
    with pytest.raises(UsageError, match="one fact at a time, and 2"):
        easyeditor.execute_rome(lm.model, lm.tokenizer, [HOME, toy.request(5)], settings("ROME", "tinyfacts"))


def test_an_executor_is_a_class_with_the_apply_function() -> None:
    lm = toy.taught("llama")
    one = easyeditor.FTRewriteExecutor()
    model, kept = one.apply_to_model(lm.model, lm.tokenizer, [HOME], settings("FT", "tinyfacts"), copy=True)
    assert answer(LM.wrap(model, lm.tokenizer), [HOME.prompt], 4) == [HOME.target_new] and kept == {}
    assert easyeditor.UltraEditRewriteExecutor.__name__ == "UltraEditRewriteExecutor"


def test_two_editors_of_one_model_see_each_others_edits() -> None:
    lm = toy.taught("llama")
    before = bits(lm.model)
    one, two = (BaseEditor(settings("FT", model_name=(lm.model, lm.tokenizer))) for _ in range(2))
    (first,) = one.apply([toy.request(0)])
    (second,) = two.apply([toy.request(5)])
    one.rollback(first)
    assert Ledger.of(lm).active == [second]
    alone = toy.taught("llama")
    with applied(alone, second):
        assert same_bits(lm.model, bits(alone.model)), "what the other editor did stays"
    two.rollback(second)
    assert same_bits(lm.model, before)


def test_a_copy_of_an_edited_model_is_a_model_of_its_own() -> None:
    lm = toy.taught("llama")
    editor = BaseEditor(settings("FT", model_name=(lm.model, lm.tokenizer)))
    editor.apply([toy.request(0)])
    copied = LM.wrap(copy.deepcopy(lm.model), lm.tokenizer)
    assert not Ledger.of(copied).active
    assert answer(copied, [toy.request(0).prompt], 4) == [toy.request(0).target_new]


def test_a_run_goes_on_after_a_fact_that_needs_no_change() -> None:
    lm = toy.taught("llama")
    known = dataclasses.replace(toy.request(0), target_new=toy.TRUTH["home", toy.SUBJECTS[0]])
    requests = [known, toy.request(5)]
    editor = BaseEditor(settings("FT", model_name=(lm.model, lm.tokenizer)))
    records, _, edits = editor.edit_requests(requests, sequential_edit=True)
    assert "changed nothing" in records[0]["error"]
    assert records[0]["edit_id"] is None
    assert records[0]["post"]["rewrite_gen"] == [1.0]
    assert records[1]["final"]["rewrite_gen"] == [1.0]
    assert len(edits) == 1
