"""The trainer: it learns, stops when it should, survives a kill bit for bit, and says what is wrong in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toy
from easyeditor.core.archive import read_archive
from easyeditor.core.training import TOTAL, Visit
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import DamagedFile, EditFailed, NonFinite, UsageError, WrongBase
from easyeditor.lm.model import LM
from easyeditor.methods.mend import MENDHyperParams, MENDTraining, MENDTrainingHparams, prepare
from easyeditor.requests import EditRequest, Probe
from easyeditor.trainer import EarlyStopper, EditTrainer, RunningStatAverager
from easyeditor.trainer.facts import Order, batches, requests_of, split
from easyeditor.trainer.folder import would_be_missed
from easyeditor.trainer.run import _Loop, iterations
from test_cli import document, refused

FACTS = [toy.request(i, relation) for i in range(4) for relation in ("home", "job")]


def config(**given: Any) -> MENDTrainingHparams:
    quick = {
        "model_name": "toy",
        "inner_params": ["model.layers.3.mlp.down_proj"],
        "rank": 4,
        "lr": 1e-3,
        "edit_lr": 1e-3,
        "max_iters": 12,
        "accumulate_bs": 2,
        "batch_size_once": 2,
        "val_batch_size": 1,
        "val_interval": 4,
        "log_interval": 4,
        "early_stop_patience": 1000,
        "cedit": 1.0,
    }
    return MENDTrainingHparams(**{**quick, **given})


def trainer(folder: Path, lm: LM | None = None, facts: Any = FACTS, **given: Any) -> EditTrainer:
    fresh = given.pop("fresh", False)
    return EditTrainer(config(**given), facts, facts, out=folder, lm=lm or toy.build("llama"), fresh=fresh)


def archive_bytes(folder: Path) -> list[bytes]:
    """Everything of the archive, the names of its files included."""
    found = sorted([*folder.glob("archive*")])
    return [part for path in found for part in (path.name.encode(), path.read_bytes())]


def weights(folder: Path, name: str = "archive") -> dict[str, torch.Tensor]:
    return dict(read_archive(folder, name).tensors)


def test_it_learns_and_keeps_the_best_archive(tmp_path: Path) -> None:
    lm = toy.taught("llama")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    state = torch.random.get_rng_state()
    run = trainer(tmp_path / "out", lm, max_iters=48, lr=3e-3, lr_lr=1e-3, val_interval=16)
    found = run.run()
    key = "loss/total_edit_val"
    assert found[key] == pytest.approx(min(each[key] for each in run.history), rel=1e-5)
    assert run.history[-1][key] < run.history[0][key]
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    header = read_archive(tmp_path / "out").header
    assert header["scores"][key] == min(each[key] for each in run.history)
    assert set(header["base"]["weights"]) == {"model.layers.3.mlp.down_proj.weight"}
    assert not any(name.startswith("model.") for name in weights(tmp_path / "out")), "only what was trained"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == found
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in lines} >= {4, 16, 48}
    assert {"loss/edit", "loss/loc", "edit/acc", "loss/total", "time/edit", "grad"} <= set(lines[0])
    state = prepare(lm, MENDHyperParams(archive=str(tmp_path / "out")))
    assert state["sites"] == ["model.layers.3.mlp.down_proj"]


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import test_trainer as t
from easyeditor.methods.mend import MENDTraining
plain, seen = MENDTraining.losses, []
def losses(self, groups):
    seen.append(1)
    if len(seen) > 2 * (2 + 4):  # in the first step after the second checkpoint: each had 2 + 4 passes
        open(sys.argv[1] + ".ready", "w").close()
        time.sleep(600)
    return plain(self, groups)
MENDTraining.losses = losses
t.trainer(t.Path(sys.argv[1])).run()
"""


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    env = {**os.environ, "EASYEDITOR_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent)], env=env)
    try:
        deadline = time.monotonic() + 240
        while not Path(f"{folder}.ready").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert Path(f"{folder}.ready").exists(), "it ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = read_archive(folder, "checkpoint").header["done"]
    assert done == 8
    resumed = trainer(folder)
    assert resumed.unfinished()
    scores = resumed.run()
    straight = trainer(tmp_path / "straight")
    assert straight.run() == scores and straight.history == resumed.history
    assert archive_bytes(folder) == archive_bytes(tmp_path / "straight")
    mine, other = weights(folder, "checkpoint"), weights(tmp_path / "straight", "checkpoint")
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    lines = [json.loads(line)["iteration"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and lines.count(12) == 2, "what came after the checkpoint is logged once"


def interrupted(run: EditTrainer, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run until some steps are done."""
    plain, seen = _Loop._step, list[int]()

    def step(self: _Loop, size: int) -> dict[str, float]:
        seen.append(size)
        if len(seen) > after:
            raise KeyboardInterrupt
        return plain(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            run.run()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopped_early_in_mixed_precision_it_goes_on_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    given = {"mixed_precision": "bf16", "max_iters": 8, "val_interval": 4}
    interrupted(trainer(tmp_path / "out", **given), monkeypatch, after)
    again = trainer(tmp_path / "out", **given)
    assert again.unfinished() and would_be_missed(tmp_path / "out") is (after == 3)
    again.run()
    trainer(tmp_path / "straight", cache_gb=0.0, **given).run()
    digests = [[path.name for path in (tmp_path / name).glob("archive-*")] for name in ("out", "straight")]
    assert digests[0] == digests[1] and len(digests[0]) == 1


def test_what_never_took_a_step_is_no_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupted(trainer(tmp_path / "out"), monkeypatch, 0)
    trainer(tmp_path / "out", max_iters=4, rank=3).run()
    assert not (tmp_path / "out.bk").exists() and read_archive(tmp_path / "out").header["settings"]["rank"] == 3
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / ".checkpoint.7.tmp").touch()
    assert not would_be_missed(tmp_path / "cut") and not would_be_missed(tmp_path / "nowhere")
    (tmp_path / "cut" / "notes.txt").touch()
    assert would_be_missed(tmp_path / "cut")


def test_a_training_does_not_go_on_with_another_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupted(trainer(tmp_path / "out"), monkeypatch, 3)
    other = toy.build("llama")
    with torch.no_grad():
        other.blocks[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(WrongBase, match=r"self_attn\.q_proj"):
        trainer(tmp_path / "out", other).run()
    (tmp_path / "out" / "checkpoint.json").write_text("{")
    with pytest.raises(DamagedFile, match="--force"):
        trainer(tmp_path / "out").run()
    assert trainer(tmp_path / "out", fresh=True).run()


def test_a_checkpoint_is_written_when_time_has_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", val_interval=1000)
    with monkeypatch.context() as patch:
        patch.setattr("easyeditor.trainer.run.SECONDS", 0.0)
        interrupted(run, monkeypatch, 2)
    assert read_archive(tmp_path / "out", "checkpoint").header["done"] == 4


TWO = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import test_trainer as t
folder = t.Path(sys.argv[1]) / os.environ["RANK"]  # a disk of its own
t.trainer(folder, max_iters=4).run()
t.trainer(folder, max_iters=8).run()
"""


def test_two_machines_with_disks_of_their_own_do_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "EASYEDITOR_CACHE": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, str(tmp_path), str(Path(__file__).parent)], env=env, check=True, timeout=300)
    trainer(tmp_path / "one", max_iters=8).run()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "0")
    assert all(torch.allclose(one[name].double(), two[name].double(), atol=1e-6) for name in one)
    assert not (tmp_path / "1").exists() or not list((tmp_path / "1").glob("archive*"))


def test_a_finished_training_is_not_repeated_and_another_is_moved_aside(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = trainer(folder, max_iters=4).run()
    before = archive_bytes(folder)
    again = trainer(folder, max_iters=4)
    assert again.run() == first and archive_bytes(folder) == before
    longer = trainer(folder, max_iters=8)
    assert longer.unfinished() and len(longer.history) == 0
    longer.run()
    assert [each["iteration"] for each in longer.history] == [4, 8]
    trainer(folder, max_iters=4, rank=3).run()
    assert (tmp_path / "out.bk" / "archive.json").is_file()
    assert trainer(folder, max_iters=4, rank=3, fresh=True).unfinished() is False


class Scripted:
    """An editor whose validation losses are given."""

    def __init__(self, values: list[float]) -> None:
        self.module = nn.Linear(1, 1)
        self.values, self.seen = values, 0

    def prepare(self, visits: list[Visit]) -> None:
        pass

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters())}]

    def losses(self, groups: list[list[Visit]]) -> dict[str, torch.Tensor]:
        if groups[0][0].epoch is not None:
            total = self.module.weight.sum() * torch.ones(len(groups))
            return {TOTAL: total, "loss/total_edit": total.detach()}
        self.seen += groups[0][0].place == 0
        value = self.values[min(self.seen, len(self.values)) - 1]
        return {TOTAL: torch.full((len(groups),), value), "loss/total_edit": torch.full((len(groups),), value)}

    def header(self) -> dict[str, Any]:
        return {"base": {"dtype": None, "weights": {}}}


def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path, values: list[float], **given: Any) -> EditTrainer:
    monkeypatch.setattr(MENDTrainingHparams, "editor", lambda self, lm: Scripted(values))
    return trainer(folder, **{"accumulate_bs": 1, "val_interval": 1, "max_iters": 50, **given})


def test_early_stopping_stops_and_the_best_is_what_remains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = scripted(monkeypatch, tmp_path / "a", [5.0, 3.0, 4.0, 4.0, 4.0, 1.0], early_stop_patience=3)
    run.run()
    assert [each["iteration"] for each in run.history] == [1, 2, 3, 4, 5]
    assert read_archive(tmp_path / "a").header["done"] == 2
    run = scripted(monkeypatch, tmp_path / "b", [5.0, 3.0, 4.0, 4.0, 2.0, 2.0], early_stop_patience=4, max_iters=7)
    run.run()
    assert len(run.history) == 7 and read_archive(tmp_path / "b").header["done"] == 5
    stopped = scripted(monkeypatch, tmp_path / "a", [0.0], early_stop_patience=3)
    stopped.run()
    assert len(stopped.history) == 5, "a training that stopped early is finished"


def test_the_loss_is_the_mean_over_all_batches_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However a step is cut into passes, the gradient is the same: 1 for each batch, divided by their number."""
    moved = []
    for once in (1, 3, 5):
        folder = tmp_path / str(once)
        scripted(monkeypatch, folder, [1.0], accumulate_bs=5, max_iters=5, batch_size_once=once, opt="SGD").run()
        moved.append(weights(folder, "checkpoint")["module/weight"])
    assert torch.allclose(moved[0], moved[1]) and torch.allclose(moved[0], moved[2])


def test_the_stopper_knows_which_way_is_better() -> None:
    loss, accuracy = EarlyStopper(10, "loss/total_edit_val"), EarlyStopper(10, "edit/acc_val")
    assert loss.update(5, {"loss/total_edit_val": 2.0}) and not loss.update(10, {"loss/total_edit_val": 3.0})
    assert accuracy.update(5, {"edit/acc_val": 0.2}) and accuracy.update(10, {"edit/acc_val": 0.3})
    assert not loss.should_stop() and not accuracy.should_stop()
    loss.update(15, {"loss/total_edit_val": 2.0})
    assert loss.should_stop()
    means = RunningStatAverager("val")
    means.add({"a": 1.0}, 3)
    means.add({"a": 5.0, "b": 2.0})
    assert means.average() == {"a_val": 2.0, "b_val": 2.0}


def test_a_loss_that_is_no_number_leaves_the_last_good_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = MENDTraining.losses

    def broken(self: MENDTraining, groups: Any) -> Any:
        found = plain(self, groups)
        training = groups[0][0].epoch is not None
        self.steps = getattr(self, "steps", 0) + training
        return {**found, TOTAL: found[TOTAL] * float("nan")} if training and self.steps > 4 else found

    monkeypatch.setattr(MENDTraining, "losses", broken)
    with pytest.raises(NonFinite, match=r"loss nan\) at batch 8.*best archive so far is in '.*Lower lr"):
        trainer(tmp_path / "out").run()
    assert read_archive(tmp_path / "out").header["done"] in (4, 8)
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(tmp_path / "out").values())
    monkeypatch.setattr(MENDTraining, "losses", plain)
    trainer(tmp_path / "out").run()
    assert read_archive(tmp_path / "out", "checkpoint").header["done"] == 12


def test_a_validation_that_is_no_number_ends_it_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="there is no archive yet"):
        scripted(monkeypatch, tmp_path / "a", [float("nan")]).run()
    with pytest.raises(NonFinite, match="best archive so far"):
        scripted(monkeypatch, tmp_path / "b", [5.0, float("inf")]).run()
    assert read_archive(tmp_path / "b", "checkpoint").header["done"] == 1, "the last good checkpoint stays"


@pytest.mark.parametrize("opt", ["LBFGS", "SparseAdam", "Optimizers"])
def test_an_optimiser_that_cannot_train_is_refused(tmp_path: Path, opt: str) -> None:
    with pytest.raises(UsageError, match="Choose one, such as Adam"):
        trainer(tmp_path / "out", opt=opt).run()


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a CPU does not train in"):
        trainer(tmp_path / "out", mixed_precision="fp16")
    with pytest.raises(UsageError, match=r"head of .* cannot be edited"):
        trainer(tmp_path / "out", inner_params=["lm_head.weight"]).run()
    lm = toy.build("llama")
    delta = LowRank(torch.ones(lm.mlp_out(0).d_out, 1), torch.ones(lm.mlp_out(0).d_in, 1))
    Ledger.of(lm).apply(WeightEdit(deltas={lm.mlp_out(0).weight_name: delta}))
    with pytest.raises(UsageError, match=r"carries 1 edit.*reset"):
        trainer(tmp_path / "out", lm).run()


def test_a_full_disk_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_iters=4).run()
    before = archive_bytes(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("easyeditor.core.archive.save_file", full)
    with pytest.raises(EditFailed, match=r"No space left.*untouched"):
        trainer(tmp_path / "out", max_iters=8).run()
    assert archive_bytes(tmp_path / "out") == before


def test_mixed_precision_keeps_what_is_trained_in_fp32(tmp_path: Path) -> None:
    plain, mixed = (trainer(tmp_path / name, max_iters=4, mixed_precision=name) for name in ("no", "bf16"))
    scores = plain.run(), mixed.run()
    assert mixed.processes.accelerator.mixed_precision == "bf16"
    assert scores[0] != scores[1]
    assert scores[0]["loss/total_val"] == pytest.approx(scores[1]["loss/total_val"], rel=0.1)
    kinds = {tensor.dtype for name, tensor in weights(tmp_path / "bf16").items() if "chains" in name}
    assert kinds == {torch.float32}


def test_facts_come_from_everywhere_and_a_tenth_validates(write: Any) -> None:
    file = write("facts.json", [{"prompt": f"{i} is", "target_new": "x"} for i in range(20)])
    assert len(requests_of(str(file), "The training set")) == 20
    assert len(requests_of("tinyfacts:tuning", "The training set")) > 300
    assert requests_of([FACTS[0].to_dict()], "The training set")[0].prompt == FACTS[0].prompt
    item = {"prompt": "a is", "target_new": "b", "cond": "c", "locality_prompt": "d is", "locality_ground_truth": "e"}
    (found,) = requests_of(torch.utils.data.Subset([item, item], [1]), "The training set")
    assert found.locality == {"locality": (Probe("d is", ("e",)),)}
    (bare,) = requests_of([{**item, "locality_prompt": None, "locality_ground_truth": None}], "The training set")
    assert not bare.locality
    every, most = (
        TinyFacts().requests("tuning", per_subject=None),
        requests_of("tinyfacts:tuning:3", "The training set"),
    )
    assert {r.prompt for r in most} == {r.prompt for r in every} and 2 * len(every) < len(most) < 3 * len(every)
    assert len({(r.prompt, r.target_new) for r in most}) == len(most)
    with pytest.raises(UsageError, match="no number of new answers"):
        requests_of("tinyfacts:tuning:many", "The training set")
    train, val = split(FACTS, 0)
    assert len(val) == 2 and not {each.subject for each in train} & {each.subject for each in val}
    with pytest.raises(UsageError, match="The training set, record 1, field 'target_new': it is missing"):
        requests_of([{"prompt": "a", "target_new": "b"}, {"prompt": "a"}], "The training set")
    with pytest.raises(UsageError, match="holds no requests"):
        requests_of([], "The training set")
    with pytest.raises(UsageError, match="is a int"):
        requests_of(3, "The validation set")


def test_every_fact_is_seen_once_in_an_epoch_in_an_order_of_its_own() -> None:
    order = Order(FACTS, 2, 7)
    first = [visit.place for number in range(4) for visit in order.batch(number)]
    second = [visit.place for number in range(4, 8) for visit in order.batch(number)]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    assert [visit.place for visit in Order(FACTS, 2, 7).batch(5)] == second[2:4]
    assert order.batch(4)[0].epoch == 1 and order.batch(0)[0].other != order.batch(0)[0].request


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"opt": "Nothing"}, "no optimiser of torch"),
        ({"early_stop_key": "edit/acc_vall"}, "Did you mean 'edit/acc_val'"),
        ({"eval_only": True}, "'archive' names none"),
        ({"archive": "nowhere"}, "There is no trained archive"),
    ],
)
def test_settings_of_a_run_that_make_no_sense(given: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        trainer(tmp_path / "out", **given).run()


def test_the_length_is_the_shorter_of_both() -> None:
    assert iterations(config(max_iters=10, max_epochs=2), 4) == 8
    assert iterations(config(max_iters=3, max_epochs=2), 4) == iterations(config(max_iters=3), 4) == 3
    with pytest.raises(UsageError, match="would never end"):
        iterations(config(max_iters=None), 4)


def test_settings_of_the_edit_are_not_those_of_the_training() -> None:
    with pytest.raises(UsageError, match="settings of an edit, not of a training"):
        EditTrainer(MENDHyperParams(), FACTS)


def test_it_begins_with_an_archive_and_validates_one(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", max_iters=4).run()
    found = trainer(tmp_path / "b", archive=str(tmp_path / "a"), eval_only=True).run()
    assert found == first and not (tmp_path / "b" / "archive.json").exists()
    trainer(tmp_path / "c", archive=str(tmp_path / "a"), max_iters=4).run()
    assert read_archive(tmp_path / "c").header["done"] == 4


def test_the_command(tmp_path: Path, write: Any) -> None:
    rows = [request.to_dict() for request in FACTS_OF_THE_WORLD()]
    data, out = write("facts.json", rows), tmp_path / "out"
    args = [
        "train",
        "--data",
        data,
        "--out",
        out,
        "--set",
        "max_iters=2",
        "--set",
        "accumulate_bs=2",
        "--set",
        "rank=2",
    ]
    found = document(*args)
    assert found["archive"] == str(out) and found["facts"] + found["validation"] == len(rows)
    assert found["next"] == f"easyedit edit FACTS.json --method MEND --set archive={out}"
    assert document(*args)["scores"] == found["scores"]
    edit = ["edit", "--prompt", "The capital of France is", "--target", "Rome", "--method", "MEND"]
    assert document(*edit, "--set", f"archive={out}")["answers"]
    assert "other settings" in refused(*args, "--set", "rank=3", code=2)
    assert "easyedit train --method MEND" in refused(*edit, "--set", "archive=null", code=2)
    (out / "checkpoint.json").write_text("{")
    assert "damaged" in refused(*args, code=1)
    assert document(*args, "--force")["scores"] == found["scores"]
    assert (tmp_path / "out.bk").is_dir()
    assert "it edits at once. Trained are: " in refused(*args, "--method", "ROME", code=2)
    assert "exists already" in refused("train", "--data", data, "--out", tmp_path, code=2)


def FACTS_OF_THE_WORLD() -> list[EditRequest]:
    from easyeditor.data.tinyfacts import TinyFacts

    return TinyFacts().requests("tuning", 6)


def test_a_damaged_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    trainer(tmp_path / "out", max_iters=4).run()
    (tmp_path / "out" / "checkpoint.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"checkpoint\.json' is damaged"):
        trainer(tmp_path / "out", max_iters=8).run()
    trainer(tmp_path / "out", max_iters=8, fresh=True).run()


def test_facts_that_are_edited_together_have_prompts_of_their_own() -> None:
    several = [EditRequest(prompt=f"{i % 6} is", target_new=f"{i}") for i in range(30)]
    order = Order(several, 5, seed=0)
    for epoch in range(3):
        places = [visit.place for number in range(6) for visit in order.batch(6 * epoch + number)]
        assert sorted(places) == list(range(30))
        together = [{place % 6 for place in places[start : start + 5]} for start in range(0, 25, 5)]
        assert all(len(prompts) == 5 for prompts in together)
    assert Order(several, 20, seed=0).size == 6, "no more than there are prompts"
    assert batches(several[:8], range(8), 6) == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert batches(several[:8], [0, 6, 7, 1], 2) == [[0, 7], [6, 1]]
    assert batches(several, [0, 6, 12], 2) == [[0, 6], [12]], "where nothing else is left, they meet"
