"""Carrying out a method: complete settings, prepare state, make the edit, mark it with its origin, check it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.data.named import named_facts
from easyeditor.edits.edit import DecodingEdit, Edit, PromptEdit, WeightEdit
from easyeditor.edits.health import health
from easyeditor.edits.ledger import Ledger, fingerprints
from easyeditor.errors import EditDidNothing, NonFinite, UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.clock import spent
from easyeditor.lm.model import LM
from easyeditor.registry import MethodSpec, get_method
from easyeditor.requests import EditRequest


def loaded(hparams: HyperParams, spec: MethodSpec) -> LM:
    """The model that settings name, as they say.

    Args:
        hparams: ``model_name`` is an id, a folder, or a model with its tokenizer.
        spec: The method.
    """
    options: dict[str, Any] = {
        "rewrite_module_tmp": getattr(hparams, "rewrite_module_tmp", None),
        "editable": spec.kind in ("weights", "module"),
    }
    if isinstance(hparams.model_name, str):
        lm = LM.load(
            hparams.model_name,
            dtype=hparams.dtype or ("float16" if hparams.fp16 else None),
            device=hparams.device,
            device_map="auto" if hparams.model_parallel else None,
            quantization=getattr(hparams, "quantization", None),
            **options,
        )
    else:
        lm = LM.wrap(*hparams.model_name, **options)
    lm.text.chat = hparams.use_chat_template
    return lm


def checked(requests: Sequence[EditRequest | Mapping[str, Any]], spec: MethodSpec) -> list[EditRequest]:
    """Requests, validated for a method.

    Args:
        requests: Requests, or dicts in the layout of existing scripts.
        spec: The method.

    Raises:
        UsageError: There is none, or one is wrong; the message names record, field and remedy.
    """
    must_edit(spec)
    found = [
        request if isinstance(request, EditRequest) else EditRequest.from_dict(request, f"Record {i}")
        for i, request in enumerate(requests)
    ]
    if not found:
        raise UsageError("There is nothing to edit: the list of requests is empty. Give at least one.")
    for request in found:
        request.require(spec.needs, spec.name)
    return found


def must_edit(spec: MethodSpec) -> None:
    """See that a method makes edits.

    Raises:
        UsageError: It answers questions.
    """
    if spec.kind == "answering":
        raise UsageError(
            f"{spec.name} answers questions over a memory of facts and makes no edit. Call deep_edit with cases of "
            "MQuAKE; or use SCR, which puts a fact in front of the prompts that it is about."
        )


def prepared(lm: LM, spec: MethodSpec, hparams: HyperParams, corpus: Any = None) -> Mapping[str, Any]:
    """What a method needs once per model, computed on the model as it is without any edit.

    Args:
        lm: The model.
        spec: The method.
        hparams: Complete settings.
        corpus: Text, for methods that take statistics, or the training set, for methods that take one; None: what the
            settings name.
    """
    if spec.prepare is None:
        return {}
    if corpus is None and spec.demonstrations and getattr(hparams, "train_data", None):
        corpus = named_facts(hparams.train_data)  # type: ignore[attr-defined]
    with Ledger.of(lm).suspended():
        return dict(spec.prepare(lm, hparams, corpus))


def make_edit(
    lm: LM, spec: MethodSpec, requests: Sequence[EditRequest], hparams: HyperParams, state: Mapping[str, Any]
) -> Edit:
    """Let a method make an edit, and mark it with its origin. The model is left as it was.

    Args:
        lm: The model with the edits that are on it.
        spec: The method.
        requests: What to change; an edit of the decoding is only measured with them and holds none.
        hparams: Complete settings.
        state: What `prepared` returned.
    """
    edit: Edit = spec.run(lm, requests, hparams, state, Ledger.of(lm).active)
    notes = dict(edit.notes)
    if isinstance(edit, WeightEdit):
        notes["health"] = health(lm, edit)
        notes.pop("solved", None)
    return dataclasses.replace(
        edit,
        notes=notes,
        method=spec.name,
        settings=hparams.to_dict(),
        requests=() if spec.kind == "decoding" else tuple(request.to_dict() for request in requests),
        model=lm.name,
        fingerprints=fingerprints(lm, edit),
        seed=hparams.seed,
    )


def put_on(lm: LM, edit: Edit, requests: Sequence[EditRequest]) -> str:
    """Apply an edit, and take it back at once if it does nothing or does damage.

    Args:
        lm: The model.
        edit: The edit.
        requests: What it is for; the model is run on them.

    Returns:
        The edit's id.

    Raises:
        EditDidNothing: Not one value changed.
        NonFinite: Weights or logits are no longer finite numbers.
    """
    ledger = Ledger.of(lm)
    if any(edit.id == there.id for there in ledger.active):
        raise EditDidNothing(f"The edit of '{requests[0].prompt}' is on {lm.name} already, the very same.")
    weights = {name: lm.model.get_parameter(name) for name in edit.deltas} if isinstance(edit, WeightEdit) else {}
    before: Mapping[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}
    outside = isinstance(edit, PromptEdit | DecodingEdit)  # what the model computes for a given prompt stays the same
    logits = None if weights or outside else _logits(lm, requests)
    with spent("apply"):
        edit_id = ledger.apply(edit)
    try:
        after = _logits(lm, requests)
        if not torch.isfinite(after).all():
            raise NonFinite(
                f"After the edit of '{requests[0].prompt}' the logits are not finite numbers; it was taken back. "
                "Lower the learning rate or the clamp, or use a wider dtype."
            )
        same = all(torch.equal(weight, before[name]) for name, weight in weights.items()) if weights else False
        if same or (logits is not None and torch.equal(logits, after)):
            raise EditDidNothing(
                f"{edit.method or 'The edit'} changed nothing for '{requests[0].prompt}' -> "
                f"'{requests[0].target_new}'. Try more steps, a larger learning rate or a wider dtype; "
                "or the model gives this answer already."
            )
    except BaseException:
        ledger.undo(edit_id)
        raise
    return edit_id


@torch.no_grad()
def _logits(lm: LM, requests: Sequence[EditRequest]) -> Tensor:
    return answer_logits(lm, answers(lm, [(lm.rewrite(r.prompt), r.target_new) for r in requests[:8]]))


def spec_of(hparams: HyperParams) -> MethodSpec:
    """The method that settings belong to."""
    return get_method(hparams.alg_name)
