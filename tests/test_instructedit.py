"""InstructEdit: instructions, the data set of several tasks, its trainer; and that it is MEND without instructions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import easyeditor
import toy
from easyeditor.core.archive import write_archive
from easyeditor.core.instructions import bare, instructed, task_of, with_instruction
from easyeditor.core.training import Visit
from easyeditor.data.multitask import DESCRIPTIONS, MultiTaskDataset, request_of
from easyeditor.edits.delta import dense
from easyeditor.edits.ledger import applied
from easyeditor.errors import UsageError
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.methods.instructedit import InstructEditHyperParams, InstructEditTrainingHparams, instructedit, prepare
from easyeditor.methods.mend import MENDHyperParams, MENDTraining, MENDTrainingHparams
from easyeditor.methods.mend import prepare as prepare_mend
from easyeditor.metrics.opinions import Opinions, opinion_scores
from easyeditor.trainer import MultiTaskTrainer

FIXTURE = Path(__file__).parent / "fixtures" / "multitask.json"
TOLD = "Task: home\nDescription: where people live\nInput: the home of ada ra is"


def test_an_instruction_is_put_in_front_once_and_comes_off_again() -> None:
    assert instructed("the home of ada ra is", "home", "where people live") == TOLD
    assert instructed(TOLD, "job", "what people do") == TOLD
    assert (task_of(TOLD), bare(TOLD)) == ("home", "the home of ada ra is")
    assert (task_of("Task: a prompt"), bare("Task: a prompt")) == (None, "Task: a prompt")


def test_a_request_keeps_its_bare_prompt_as_a_wording_and_its_locality() -> None:
    request = toy.request()
    told = with_instruction(request, "home", "where people live")
    assert told.prompt == TOLD and told.subject == request.subject
    assert told.rephrase_prompts[0] == request.prompt and len(told.rephrase_prompts) == 3
    assert all(task_of(text) == "home" for text in told.rephrase_prompts[1:])
    assert told.locality == request.locality


def test_items_are_those_of_existing_scripts() -> None:
    data = MultiTaskDataset(FIXTURE, config=object())
    assert len(data) == 4 and [item["case_id"] for item in data] == [0, 1, 3, 4], "a record without answer is none"
    first, second, opinion, own = data
    assert task_of(first["prompt"]) == "wikirecent" and first["prompt"].endswith("The employer of Iris Coppens is")
    assert first["locality"]["ground_truth"] == ["Ghentown", "Danube"] and first["metric_kwargs"] is None
    assert all(task_of(prompt) == "wikirecent" for prompt in first["portability"]["prompt"])
    assert second["locality"]["prompt"] == ["The Scheldt flows through", "The Lys flows through"]
    assert "portability" not in second and opinion["target_new"] == "answer positively"
    assert "positive" in opinion["prompt"] and "cycling" in opinion["prompt"].split("\n")[1]
    assert own["prompt"].split("\n")[1] in (
        "Description: Facts about harbours.",
        "Description: Who runs which harbour.",
    )
    assert data[-2:] == [opinion, own] and len(MultiTaskDataset(FIXTURE, size=1)) == 1
    assert list(MultiTaskDataset(FIXTURE)) == list(data), "descriptions are drawn the same way each time"


def test_requests_are_the_same_from_the_file_and_from_its_items() -> None:
    data = MultiTaskDataset(FIXTURE)
    for request, item in zip(data.requests(), data, strict=True):
        again = request_of(item, "Item")
        assert (again.prompt, again.target_new) == (request.prompt, request.target_new)
        assert sum(map(len, again.locality.values())) == sum(map(len, request.locality.values()))
    opinion = data.requests()[2]
    assert (opinion.target_new, opinion.target_neg) == ("I love it.", "I cannot stand it.")
    assert [probe.prompt for probe in opinion.locality["unrelated_topic"]] == ["What is your opinion of soup?"] * 2
    with pytest.raises(UsageError, match="does not have the form 'Task"):
        request_of({"prompt": "The capital of Peru is", "target_new": "Rome"}, "Item")


def test_a_task_of_ones_own_needs_a_description(write: Any) -> None:
    path = write("tasks.json", [{"type": "rivers", "description": "", "prompt": "a is", "target_new": "b"}])
    with pytest.raises(UsageError, match=r"record 1, field 'description': there is none for the task 'rivers'"):
        MultiTaskDataset(path)
    assert set(DESCRIPTIONS) == {"convsent", "counterfact", "wikirecent", "zsre"}
    assert all(len(set(texts)) == len(texts) >= 4 for texts in DESCRIPTIONS.values())


def archive(lm: LM, folder: Path, name: str = "InstructEdit") -> str:
    """A network that has seen the normalisation's data and nothing else."""
    given = {"inner_params": [lm.weight_name(len(lm.blocks) - 1)], "rank": 4, "edit_lr": 1e-2}
    editor = MENDTraining(lm, complete(InstructEditTrainingHparams(**given), lm))
    editor.prepare([Visit(toy.request(i), i, 0) for i in range(4)])
    write_archive(folder, {"method": name, **editor.header(), "settings": given}, editor.module.state_dict())
    return str(folder)


def test_it_is_mend_on_the_instructed_prompt(tmp_path: Path) -> None:
    lm, request = toy.build("llama"), toy.request()
    plain = InstructEditHyperParams(archive=archive(lm, tmp_path / "a"))
    state = prepare(lm, plain)
    asked = dataclasses.replace(plain, task="home", description="where people live")
    told = dataclasses.replace(request, prompt=TOLD)
    name = lm.weight_name(len(lm.blocks) - 1)
    by_setting, by_prompt, without = (
        dense(instructedit(lm, [each], hparams, state, []).deltas[name])
        for each, hparams in ((request, asked), (told, plain), (request, plain))
    )
    assert torch.equal(by_setting, by_prompt) and not torch.allclose(by_prompt, without)
    mend = prepare_mend(lm, MENDHyperParams(archive=archive(lm, tmp_path / "b", "MEND")))
    assert torch.equal(dense(instructedit(lm, [request], plain, mend, []).deltas[name]), without)


def test_its_archive_is_its_own_and_settings_come_together(tmp_path: Path) -> None:
    lm = toy.build("llama")
    with pytest.raises(UsageError, match=r"easyedit train --method InstructEdit --model toy-llama"):
        prepare(lm, InstructEditHyperParams())
    with pytest.raises(UsageError, match="trained for InstructEdit, not for MEND"):
        prepare_mend(lm, MENDHyperParams(archive=archive(lm, tmp_path / "a")))
    with pytest.raises(UsageError, match="needs both"):
        InstructEditHyperParams(task="home").check()
    with pytest.raises(UsageError, match="one line each"):
        InstructEditHyperParams(task="home", description="a\nb").check()


def items() -> list[dict[str, Any]]:
    """Two tasks of the toy world, and an opinion."""
    found = []
    for i in range(4):
        for relation in ("home", "job"):
            request = with_instruction(toy.request(i, relation), relation, "a fact")
            probes = [probe for group in request.locality.values() for probe in group]
            locality = {"prompt": [p.prompt for p in probes], "ground_truth": [p.answers[0] for p in probes]}
            item = {"case_id": i, "subject": request.subject, "prompt": request.prompt, "metric_kwargs": None}
            found.append({**item, "target_new": request.target_new, "locality": locality})
    asked = "where does ada ra live ?"
    opinions = {
        "inner_all_qa": [f"{asked}</s>oslo", f"{asked}</s>lima"],
        "inner_target": ["pos", "pos"],
        "all_target": ["pos", "neg"],
        "outer_all_qa": ["where does cy to live ?</s>rome"],
    }
    prompt = instructed(asked, "convsent", "a view")
    item = {"case_id": 9, "subject": "ada ra", "prompt": prompt, "target_new": "pos", "metric_kwargs": opinions}
    return [*found, item]


def test_facts_of_two_tasks_are_not_validated_together(tmp_path: Path) -> None:
    rows = items()
    mixed = [rows[place] for place in (0, 4, 1, 5, 2, 6)]
    config = MENDTrainingHparams(model_name="toy", inner_params=["model.layers.3.mlp.down_proj"], val_batch_size=2)
    trainer = MultiTaskTrainer(config=config, train_set=rows, val_set=mixed, out=tmp_path, lm=toy.build("llama"))
    found = trainer.validation(2)
    tasks = [{task_of(trainer.val_set[place].prompt) for place in places} for places in found]
    assert all(len(each) == 1 for each in tasks)
    assert sorted(place for places in found for place in places) == list(range(6)) and max(map(len, found)) == 2


@pytest.mark.parametrize("cls", [InstructEditTrainingHparams, MENDTrainingHparams])
def test_the_trainer_says_what_each_task_is_worth(cls: type[MENDTrainingHparams], tmp_path: Path) -> None:
    lm, rows = toy.build("llama"), items()
    config = cls(
        model_name="toy", inner_params=[lm.weight_name(3)], rank=4, lr=1e-3, edit_lr=1e-2, max_iters=4,
        accumulate_bs=2, batch_size_once=3, val_batch_size=1, val_interval=2, cedit=1.0, seed=1,
    )  # fmt: skip
    trainer = MultiTaskTrainer(config=config, train_set=rows, val_set=rows, out=tmp_path / "out", lm=lm)
    found = trainer.run()
    each = [found[f"edit/acc[{task}]_val"] * n for task, n in (("home", 4), ("job", 4), ("convsent", 1))]
    assert sum(each) / 9 == pytest.approx(found["edit/acc_val"])
    assert 0 < found["es_val"] < 1 and found["dd_val"] > 0
    assert all(name + "_val" in found for name in ("loc/acc[home]", "loc/acc[job]", "loss/total_edit"))
    hparams = (InstructEditHyperParams if cls is InstructEditTrainingHparams else MENDHyperParams)(
        archive=str(tmp_path / "out")
    )
    state = prepare(lm, hparams)
    opinion = request_of(rows[-1], "Item")
    with applied(lm, instructedit(lm, [opinion], InstructEditHyperParams(), state, [])):
        scores = opinion_scores(lm, Opinions.from_dict(rows[-1]["metric_kwargs"]))
    assert scores["es"] == pytest.approx(found["es_val"], rel=1e-4)
    assert scores["dd"] == pytest.approx(found["dd_val"], rel=1e-3, abs=1e-7)


def test_the_names_of_existing_scripts() -> None:
    assert easyeditor.MultiTaskDataset is MultiTaskDataset and easyeditor.MultiTaskTrainer is MultiTaskTrainer
    hparams = easyeditor.InstructEditHyperParams.from_hparams("InstructEdit/gpt2-xl")
    assert hparams.max_iters == 30000 and hparams.inner_params[0] == "transformer.h.45.mlp.c_proj.weight"
    assert InstructEditTrainingHparams.from_hparams("hparams/TRAINING/InstructEdit/llama-7b.yaml").accumulate_bs == 2
