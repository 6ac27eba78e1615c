"""`easyedit train`: train the network that a method edits with."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyeditor.cli.common import door, emit, keep_what_is_there, out, table, waiting
from easyeditor.cli.facts import many_facts
from easyeditor.cli.options import (
    ChatOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    HparamsOption,
    JsonOption,
    LayoutOption,
    LoadedModelOption,
    SeedOption,
    SetOption,
)
from easyeditor.cli.settings import Choice
from easyeditor.errors import UsageError

if TYPE_CHECKING:
    from easyeditor.hparams.training import Trained
    from easyeditor.trainer import EditTrainer


@door
def train(
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA", help="What to learn from: a data file, or tinyfacts:tuning:6.", show_default=False
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the archive goes.", show_default=False)],
    method: Annotated[str, typer.Option(help="The method; those that are trained, such as MEND.")] = "MEND",
    model: LoadedModelOption = None,
    val: Annotated[
        str | None, typer.Option("--val", metavar="DATA", help="What to validate with; else a tenth of --data.")
    ] = None,
    layout: LayoutOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Learn from at most this many facts.")] = None,
    settings: SetOption = None,
    hparams: HparamsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    chat: ChatOption = False,
    seed: SeedOption = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew; what DIR holds is moved to DIR.bk.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the network that a method edits with, once per model.

    A training that was stopped, also by a kill, goes on where it was when the same command is given again. Under
    'accelerate launch -m easyeditor.cli train' processes and machines share the work.
    """
    cls = _trained(method)
    chosen = Choice(method, model, hparams, tuple(settings or ()), device, dtype, chat, seed).hparams()
    known = {field.name for field in dataclasses.fields(cls)}
    said = cls(**{name: getattr(chosen, name) for name in chosen.given if name in known})
    said.check()
    requests = many_facts(data, limit, layout)
    validation = many_facts(val, None, layout) if val is not None else None

    from easyeditor.trainer import EditTrainer
    from easyeditor.trainer.folder import CHECKPOINT, would_be_missed

    lost = would_be_missed(folder)
    if lost and not (folder / f"{CHECKPOINT}.json").is_file():
        keep_what_is_there(folder, force)
    trainer = EditTrainer(said, requests, validation, out=folder, fresh=force)
    with waiting("Loading the model"):
        name = trainer.lm.name
    if lost and not force and not trainer.unfinished():
        raise UsageError(
            f"'{folder}' holds a training with other settings or other facts: choose another name, or pass --force to "
            "begin anew."
        )
    start = time.perf_counter()
    scores = trainer.run()
    if not trainer.processes.first:
        return
    result = _result(trainer, said, data, name, scores, time.perf_counter() - start)
    if as_json:
        emit(result)
    else:
        _print(result)


def _trained(method: str) -> type[Trained]:
    """The settings of a method's training.

    Raises:
        UsageError: The method does not exist, or is not trained.
    """
    from easyeditor.registry import get_method, methods

    cls: type[Trained] | None = getattr(get_method(method).hparams, "training", None)
    if cls is None:
        trained = [name for name, spec in methods().items() if getattr(spec.hparams, "training", None)]
        raise UsageError(f"{method} is not trained, it edits at once. Trained are: {', '.join(trained)}.")
    return cls


def _result(
    trainer: EditTrainer, said: Trained, data: str, model: str, scores: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    folder = str(trainer.folder)
    option = "" if model == "tinyfacts" else f" --model {shlex.quote(model)}"
    return {
        "method": said.alg_name,
        "model": model,
        "data": data,
        "facts": len(trainer.train_set),
        "validation": len(trainer.val_set),
        "seconds": seconds,
        "scores": dict(scores),
        "archive": folder,
        "next": f"easyedit edit FACTS.json --method {said.alg_name}{option} --set archive={shlex.quote(folder)}",
    }


def _print(result: Mapping[str, Any]) -> None:
    console = out()
    names = ("loss/total_val", "edit/acc_val", "loss/loc_val", "loc/acc_val")
    cells = [(name.removesuffix("_val"), f"{result['scores'][name]:.4f}") for name in names if name in result["scores"]]
    title = f"{result['method']} on {result['model']}, validated with {result['validation']} facts"
    console.print(table(title, ("score", "mean"), cells, right=("mean",)))
    console.print(f"\nTrained on {result['facts']} facts in {result['seconds']:.0f} s. Edit with it:")
    console.print(f"  {result['next']}", markup=False, soft_wrap=True)
