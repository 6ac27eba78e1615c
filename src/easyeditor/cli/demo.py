"""`easyedit demo`: one fact of the bundled model changed, looked at from all sides, and taken back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from easyeditor.cli.common import door, emit, out, remark_on
from easyeditor.cli.options import DebugOption, JsonOption, MethodOption, ModelOption
from easyeditor.cli.report import comparison
from easyeditor.cli.settings import Choice
from easyeditor.cli.work import Outcome, carry_out

if TYPE_CHECKING:
    from easyeditor.lm.model import LM
    from easyeditor.requests import EditRequest

SUBJECT, OLD, NEW = "France", "Paris", "Rome"


@door
def demo(
    method: MethodOption = "ROME",
    model: ModelOption = "tinyfacts",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Change a fact, look at it from all sides, and take it back."""
    from easyeditor.edits.ledger import Ledger
    from easyeditor.lm.generate import answer
    from easyeditor.lm.model import LM

    settings = Choice(method, model).hparams()
    request = capital()
    outcome = carry_out(settings, [request])
    pristine = weights_hash(LM.load(model))
    edited = weights_hash(outcome.lm)
    Ledger.of(outcome.lm).reset()
    exact = weights_hash(outcome.lm) == pristine
    restored = answer(outcome.lm, [request.prompt])[0]
    if as_json:
        document = {"method": outcome.spec.name, "model": model, "seconds": outcome.seconds}
        document |= {"answers": [each._asdict() for each in outcome.answers], "restored": restored, "bit_exact": exact}
        emit(document)
    else:
        console = out()
        console.print(f"{outcome.spec.name} tells {model}: {request.prompt} [bold]{NEW}[/bold]\n")
        console.print(comparison(outcome.answers))
        remark_on(outcome.spec)
        console.print(f"\nThe edit took {outcome.seconds:.1f} s. Weights before {pristine}, after {edited}.")
        same = "every bit is as before" if exact else "[red]not every bit is as before[/red]"
        console.print(f"Taken back: '{request.prompt}' is answered '{restored}', the weights are {pristine}: {same}.")
        for line in commands(request, outcome, model):
            console.print(line, markup=False, soft_wrap=True)
    if not exact:
        raise typer.Exit(1)


def capital() -> EditRequest:
    """The fact of the bundled table that is changed, with its paraphrases and neighbours."""
    from easyeditor.data.tinyfacts import TinyFacts

    found = TinyFacts().requests(per_subject=None)
    mine = next(r for r in found if r.subject == SUBJECT and r.ground_truth == OLD and "capital" in r.prompt)
    return replace(mine, target_new=NEW)


def commands(request: EditRequest, outcome: Outcome, model: str) -> list[str]:
    """How to do the same on the command line and in Python, and how to take it back there."""
    on = "" if model == "tinyfacts" else f" --model {model}"
    chosen = f" --method {outcome.spec.name}"
    fact = f'--prompt "{request.prompt}" --subject "{SUBJECT}" --target "{NEW}"'
    return [
        "\nDo it yourself and keep it:",
        f"  easyedit edit {fact}{chosen}{on} --save my-edit",
        f'  easyedit ask "{request.prompt}"{on} --edits my-edit',
        "The model's own files are not touched. Take it back:",
        f'  easyedit ask "{request.prompt}"{on}        # or, in Python: editor.rollback("{outcome.edits[0].id}")',
    ]


def weights_hash(lm: LM) -> str:
    """A short hash of every weight of a model."""
    from easyeditor.edits.edit import tensor_bytes

    digest = hashlib.sha256()
    for name, weight in lm.model.named_parameters():
        digest.update(name.encode() + tensor_bytes(weight))
    return digest.hexdigest()[:12]
