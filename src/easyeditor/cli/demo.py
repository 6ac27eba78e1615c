"""`easyedit demo`: one fact of the bundled model changed, looked at from all sides, and taken back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from easyeditor.cli.common import DebugOption, JsonOption, MethodOption, ModelOption, door, emit, out
from easyeditor.cli.report import as_document, comparison
from easyeditor.cli.work import carry_out

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
    from easyeditor.registry import get_method

    settings = get_method(method).hparams(model_name=model)
    request = capital()
    outcome = carry_out(settings, [request])
    pristine = weights_hash(LM.load(model))
    edited = weights_hash(outcome.lm)
    Ledger.of(outcome.lm).reset()
    exact = weights_hash(outcome.lm) == pristine
    restored = answer(outcome.lm, [request.prompt])[0]
    if as_json:
        document = {"method": outcome.method, "model": model, "seconds": outcome.seconds}
        document |= {"answers": as_document(outcome.answered), "restored": restored, "bit_exact": exact}
        emit(document)
        return
    console = out()
    console.print(f"{outcome.method} tells {model}: {request.prompt} [bold]{NEW}[/bold]\n")
    console.print(comparison(outcome.answered))
    console.print(f"\nThe edit took {outcome.seconds:.1f} s. Weights before {pristine}, after {edited}.")
    same = "every bit is as before" if exact else "[red]not every bit is as before[/red]"
    console.print(f"Taken back: '{request.prompt}' is answered '{restored}', the weights are {pristine}: {same}.")
    console.print("\nDo it yourself, keep it, ask, and take it back:")
    for line in commands(request, outcome.method, model):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if not exact:
        raise typer.Exit(1)


def capital() -> EditRequest:
    """The fact of the bundled table that is changed, with its paraphrases and neighbours."""
    from easyeditor.data.tinyfacts import TinyFacts

    found = TinyFacts().requests(per_subject=None)
    mine = next(r for r in found if r.subject == SUBJECT and r.ground_truth == OLD and "capital" in r.prompt)
    return replace(mine, target_new=NEW)


def commands(request: EditRequest, method: str, model: str) -> list[str]:
    """The same on the command line."""
    on = "" if model == "tinyfacts" else f" --model {model}"
    with_method = "" if method == "ROME" else f" --method {method}"
    fact = f'--prompt "{request.prompt}" --subject "{SUBJECT}" --target "{NEW}"'
    return [
        f"easyedit edit {fact}{with_method}{on} --save my-edit",
        f'easyedit ask "{request.prompt}"{on} --edits my-edit',
        f'easyedit ask "{request.prompt}"{on}',
        "rm -r my-edit",
    ]


def weights_hash(lm: LM) -> str:
    """A short hash of every weight of a model."""
    from easyeditor.edits.edit import tensor_bytes

    digest = hashlib.sha256()
    for name, weight in lm.model.named_parameters():
        digest.update(name.encode() + tensor_bytes(weight))
    return digest.hexdigest()[:12]
