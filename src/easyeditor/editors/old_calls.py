"""The functions and classes by which existing scripts call a method without an editor."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from easyeditor.editors.options import training_set
from easyeditor.editors.perform import checked, make_edit, prepared, put_on
from easyeditor.edits.delta import LowRank, dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import UnknownArgument, UsageError, did_you_mean
from easyeditor.hparams import HyperParams, complete
from easyeditor.lm.model import LM
from easyeditor.registry import MethodSpec, fold, methods
from easyeditor.requests import EditRequest

OneOrMany = Sequence[EditRequest | Mapping[str, Any]] | Mapping[str, Any]


def old_call(name: str) -> Any:
    """What existing scripts import for a method: ``apply_x_to_model``, ``execute_x`` or ``XRewriteExecutor``.

    Args:
        name: The name, in any case.

    Returns:
        The function or class; None if the name is none of these.
    """
    forms = {"apply_{}_to_model": apply_function, "execute_{}": execute_function, "{}RewriteExecutor": executor}
    for spec in methods().values():
        for form, made in forms.items():
            if fold(name) in {fold(form.format(known)) for known in (spec.name, *spec.aliases)}:
                return made(spec)
    return None


def names() -> list[str]:
    """What existing scripts import for the methods: the settings and the ``apply_x_to_model`` of each."""
    found = [
        (
            spec.hparams.__name__,
            *(f"apply_{known.lower().replace('-', '_')}_to_model" for known in (spec.name, *spec.aliases)),
        )
        for spec in methods().values()
    ]
    return list(dict.fromkeys(name for each in found for name in each))


def apply_function(spec: MethodSpec) -> Callable[..., Any]:
    """The function ``apply_<method>_to_model`` of existing scripts, for any method.

    Args:
        spec: The method.

    Returns:
        ``apply(model, tok, requests, hparams, copy=False, return_orig_weights=False, keep_original_weight=False)``,
        which returns the edited model and the touched weights as they were (``{name: tensor}``); for a method that
        changes no weight, a function that takes the edit back. Called with the settings first, as scripts for
        unstructured answers do, ``apply(model, tok, hparams, batch_data, ex_data)``, it takes questions with answers
        and the texts to keep, and returns only the weights as they were.
    """
    if spec.kind == "answering":
        return spec.run

    def apply(
        model: Any,
        tok: Any,
        requests: OneOrMany,
        hparams: HyperParams,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> Any:
        if isinstance(requests, HyperParams):
            return _settings_first(spec, model, tok, requests, hparams, copy)
        if unknown := set(kwargs) - {"train_ds", "num_instruct", "cache_template"}:
            name = sorted(unknown)[0]
            known = ("copy", "return_orig_weights", "keep_original_weight", "train_ds")
            raise UnknownArgument(f"apply of {spec.name}: unknown argument '{name}'. {did_you_mean(name, known)}")
        train_ds = training_set(kwargs, spec)
        lm, found, full = _opened(copying.deepcopy(model) if copy else model, tok, requests, hparams, spec)
        state = prepared(lm, spec, full, train_ds)
        ledger = Ledger.of(lm)
        ids: list[str] = []
        before: dict[str, Tensor] = {}
        alone = not ledger.active
        for part in [found] if spec.requests == "many" else [[request] for request in found]:
            edit = make_edit(lm, spec, part, full, state)
            for name in edit.deltas if isinstance(edit, WeightEdit) else ():
                before.setdefault(name, lm.model.get_parameter(name).detach().clone())
            ids.append(put_on(lm, edit, part))
        if spec.kind == "weights":
            if alone:
                ledger.forget()  # scripts put weights back by hand, which a ledger would not see
            return lm.model, before if return_orig_weights or keep_original_weight else {}
        return lm.model, lambda: [ledger.undo(edit_id) for edit_id in ids]

    apply.__name__ = f"apply_{spec.name.lower()}_to_model"
    apply.__doc__ = f"Edit a model with {spec.name}; see `easyeditor.editors.perform.apply_function`."
    return apply


def _settings_first(spec: MethodSpec, model: Any, tok: Any, hparams: HyperParams, data: Any, texts: Any) -> Any:
    """The weights as they were, after questions with answers were written and some texts kept."""
    rows = [data] if isinstance(data, Mapping) else list(data)
    names = {"question": "prompt", "answer": "target_new"}
    requests: list[EditRequest | Mapping[str, Any]] = [{names.get(k) or k: row[k] for k in row} for row in rows]
    lm, found, full = _opened(model, tok, requests, hparams, spec)
    edit = make_edit(lm, spec, found, full, prepared(lm, spec, full, list(texts) if texts else None))
    names_of = edit.deltas if isinstance(edit, WeightEdit) else {}
    before = {name: lm.model.get_parameter(name).detach().clone() for name in names_of}
    put_on(lm, edit, found)
    Ledger.of(lm).forget()
    return before


def execute_function(spec: MethodSpec) -> Callable[..., dict[str, Any]]:
    """The function ``execute_<method>`` of existing scripts: the change of each weight; the model stays as it is.

    Args:
        spec: The method.

    Returns:
        ``execute(model, tok, requests, hparams)``, which returns ``{weight name: change}``. A change is a tensor
        (d_out, d_in), or a pair (left, right) whose product ``left @ right.T`` it is; for a method of one fact at a
        time the pair is two vectors, whose outer product it is.
    """

    def execute(model: Any, tok: Any, requests: OneOrMany, hparams: HyperParams, **kwargs: Any) -> dict[str, Any]:
        if kwargs:
            known = ("model", "tok", "requests", "hparams")
            raise UnknownArgument(f"execute of {spec.name}: unknown argument. {did_you_mean(min(kwargs), known)}")
        lm, found, full = _opened(model, tok, requests, hparams, spec)
        if spec.requests == "one" and len(found) > 1:
            raise UsageError(
                f"{spec.name} edits one fact at a time, and {len(found)} were given. Call it once for each."
            )
        edit = make_edit(lm, spec, found, full, prepared(lm, spec, full))
        if not isinstance(edit, WeightEdit):
            called = f"apply_{spec.name.lower()}_to_model"
            raise UsageError(f"{spec.name} changes no weight, so there is no change to return. Call {called}.")
        return {name: _as_scripts_know(delta, spec.requests == "one") for name, delta in edit.deltas.items()}

    execute.__name__ = f"execute_{spec.name.lower()}"
    execute.__doc__ = f"The change that {spec.name} would make; see `easyeditor.editors.old_calls.execute_function`."
    return execute


def executor(spec: MethodSpec) -> type[Any]:
    """The class ``<Method>RewriteExecutor`` of existing scripts.

    Args:
        spec: The method.

    Returns:
        A class whose objects have the one method ``apply_to_model``, with the arguments of `apply_function`'s result,
        and no state.
    """
    made = type(f"{spec.name}RewriteExecutor", (), {"apply_to_model": staticmethod(apply_function(spec))})
    made.__doc__ = f"Edits models with {spec.name}: ``apply_to_model(model, tok, requests, hparams, ...)``."
    return made


def _opened(
    model: Any, tok: Any, requests: OneOrMany, hparams: HyperParams, spec: MethodSpec
) -> tuple[LM, list[EditRequest], HyperParams]:
    """The model as an editor sees it, valid requests, and complete settings."""
    listed = [requests] if isinstance(requests, EditRequest | Mapping) else list(requests)
    found = checked(listed, spec)
    template = getattr(hparams, "rewrite_module_tmp", None)
    lm = LM.wrap(model, tok, rewrite_module_tmp=template, editable=spec.kind in ("weights", "module"))
    lm.text.chat = hparams.use_chat_template
    return lm, found, complete(hparams, lm)


def _as_scripts_know(delta: Any, single: bool) -> Any:
    if not isinstance(delta, LowRank):
        return dense(delta)
    left, right = delta.left, delta.right
    return (left[:, 0], right[:, 0]) if single and left.shape[1] == 1 else (left, right)
