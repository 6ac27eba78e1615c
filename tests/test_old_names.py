"""Small helpers of existing scripts: what they take and return, and that they are found by name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import easyeditor
import toy
from easyeditor.data.personality import PersonalityDataset
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import UsageError
from easyeditor.lm.generate import answer
from easyeditor.methods.mend import MENDTrainingHparams

FIXTURE = Path(__file__).parent / "fixtures" / "personality.json"


def test_the_likeliest_tokens_are_compared_at_the_last_places() -> None:
    before, after = torch.zeros(2, 3, 5), torch.zeros(2, 2, 5)
    before[:, :, 1], before[0, 2, 4] = 1.0, 2.0
    after[:, :, 1], after[1, 1, 0] = 1.0, 2.0
    found = easyeditor.get_aligned_topk_token_ids(before, after.tolist(), 1)
    assert found == ([[[1], [4]], [[1], [1]]], [[[1], [1]], [[1], [0]]])
    assert len(easyeditor.get_aligned_topk_token_ids(before, after, 9)[0][0][0]) == 5
    with pytest.raises(UsageError, match="cannot be compared"):
        easyeditor.get_aligned_topk_token_ids(before[0], after[0], 1)
    record = {"pre": {"locality_output": before}, "post": {"locality_output": after, "rewrite_acc": [1.0]}}
    easyeditor.attach_topk_locality_metrics(record)
    assert record["post"]["locality_acc"] == 0.5 and record["pre"] == {"locality_topk_tokens": found[0]}
    assert record["post"]["metric_meta"]["locality.text"]["scorer"] == "top1_token_match"
    assert "locality_output" not in record["post"] and record["post"]["locality_topk_tokens"] == found[1]


def test_a_methods_name_under_either_field() -> None:
    rest = {"lr": 1.0}
    assert easyeditor.normalize_alg_name({"alg": "MEND", **rest}, "MEND") == {"alg_name": "MEND", **rest}
    kept = easyeditor.normalize_alg_name({"alg_name": "M"}, "MEND", aliases={"M": "MEND"}, keep_legacy=True)
    assert kept == {"alg_name": "MEND", "alg": "MEND"}
    with pytest.raises(UsageError, match="name no method"):
        easyeditor.normalize_alg_name(rest, "MEND")
    with pytest.raises(ValueError, match="'KE', and MEND was expected"):
        easyeditor.normalize_alg_name({"alg_name": "MEND", "alg": "KE"}, "MEND")


def test_one_old_answer_for_each_edit() -> None:
    assert easyeditor.normalize_ground_truths("Rome") == ["Rome"]
    assert easyeditor.normalize_ground_truths([["Rome", "Roma"], "Lima", None]) == ["Rome", "Lima", None]
    assert easyeditor.normalize_ground_truths(None, 2) == [None, None]
    with pytest.raises(UsageError, match="1 answers for 2 edits"):
        easyeditor.normalize_ground_truths(["Rome"], 2)


def test_logs_are_written_because_the_caller_asks(tmp_path: Path) -> None:
    logger = logging.getLogger("easyeditor")
    handlers, level = list(logger.handlers), logger.level
    try:
        for _ in range(2):
            easyeditor.make_logs(tmp_path / "logs")
        logging.getLogger("easyeditor.anything").info("said once")
        assert (tmp_path / "logs" / "run.log").read_text().count("said once") == 1
    finally:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.mark.parametrize(("name", "method"), [("LORA", "MELO"), ("ULTRAEDIT", "UltraEdit")])
def test_a_wrapped_model_is_edited_with_its_method(name: str, method: str) -> None:
    lm, request = toy.taught("llama"), toy.request()
    settings = easyeditor.get_method(method).hparams(
        **{**toy.SETTINGS[method], **({"lr": 4e-2} if name == "ULTRAEDIT" else {})}
    )
    wrapped = getattr(easyeditor, name)(lm.model, settings)
    asked = {"prompt": request.prompt, "target_new": request.target_new, "subject": request.subject}
    with pytest.raises(UsageError, match=f"{name} has no tokenizer"):
        wrapped.edit(asked)
    assert wrapped.edit([asked], lm.tokenizer) is wrapped and wrapped.model is lm.model
    assert answer(lm, [request.prompt], 4) == [request.target_new]
    ids = torch.tensor([lm.text.encode(request.prompt).ids])
    assert torch.equal(wrapped(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    Ledger.of(lm).forget()


def test_a_personality_in_context_is_measured() -> None:
    lm, data = toy.build("llama"), PersonalityDataset(FIXTURE)
    first, second = data[0], data[1]
    example = easyeditor.PER_ALG_DICT["IKE"](first, second, lm.tokenizer, "cpu")
    outer = example["outer_edit"]
    assert outer["input_ids"].shape == outer["q_mask"].shape == outer["labels"].shape
    assert len(outer["input_ids"]) == len(first["all_comp"]) and len(example["loc_pre"]["labels"]) == len(
        second["all_comp"]
    )
    for row, text in enumerate(first["all_comp"]):
        said = lm.text.decode(outer["input_ids"][row][outer["q_mask"][row]].tolist())
        assert said.strip() == lm.text.decode(lm.tokenizer(text, add_special_tokens=False).input_ids).strip()
    assert first["target_personality"] in example["edit_q"] and first["target_personality"] not in example["pre_q"]
    found = easyeditor.compute_per_ike_metric(example, lm.model, lm.tokenizer)
    assert 0 <= found["es"] <= 1 and found["dd"] >= 0
    with pytest.raises(UsageError, match="loc_request, field 'all_prompt'"):
        easyeditor.apply_ike_to_per_model(first, {}, lm.tokenizer)


def test_the_trainer_of_opinions_says_how_far_they_turned(tmp_path: Path) -> None:
    lm, data = toy.build("llama"), PersonalityDataset(FIXTURE)
    config = MENDTrainingHparams(
        model_name="toy", inner_params=[lm.weight_name(3)], rank=2, max_iters=2, accumulate_bs=1, val_interval=2,
        val_batch_size=1, edit_lr=1e-3,
    )  # fmt: skip
    found = easyeditor.PEREditTrainer(config, data, data, out=tmp_path / "out", lm=lm).run()
    assert 0 < found["es_val"] < 1 and found["dd_val"] >= 0


def test_all_names_are_imported_by_a_star_and_none_is_missing() -> None:
    space: dict[str, object] = {}
    exec("from easyeditor import *", space)
    assert {"BaseEditor", "MENDHyperParams", "ROMEHyperParams", "apply_r_rome_to_model", "ALG_DICT"} <= space.keys()
    assert all(hasattr(easyeditor, name) for name in dir(easyeditor))
    assert easyeditor.BaseTrainer is easyeditor.EditTrainer
    assert easyeditor.ALG_TRAIN_DICT["MEND"] is MENDTrainingHparams and "ROME" not in easyeditor.ALG_TRAIN_DICT
