"""Which edits are on a model, in which order.

The untouched tensor of each touched weight is kept once, and the weight is always rebuilt as base plus the sum of the
active changes: taking an edit back is exact in any order and any precision, which subtracting it would not be. In a
long stream the last two sums are kept, so that adding an edit or taking the newest back costs one change and not all.
What wraps a module is likewise the function of all wrappers on it, in their order; one that can go on from what it was
(`become`) does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyeditor.edits.delta import Delta
from easyeditor.edits.edit import Ask, DecodingEdit, Edit, ModuleEdit, PromptEdit, WeightEdit, fingerprint, in_front
from easyeditor.errors import NonFinite, UsageError, WrongBase
from easyeditor.lm.decoding import attach, check_exits, layers_of
from easyeditor.lm.generate import continuations
from easyeditor.lm.hooks import hidden, with_hidden
from easyeditor.lm.model import LM

LONG = 8  # changes of one weight from which on their sums are kept


class Ledger:
    """The edits that are on a model. There is one per model: get it with `Ledger.of`."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._active: dict[str, Edit] = {}
        self._bases: dict[str, Tensor] = {}
        self._prints: dict[str, str] = {}
        self._sums: dict[str, list[tuple[list[Delta], Tensor]]] = {}
        self._handles: dict[str, Any] = {}
        self._changes: dict[str, Any] = {}  # module -> the function of all its wrappers

    @classmethod
    def of(cls, lm: LM) -> Ledger:
        """The ledger of a model."""
        if lm.kept.ledger is None:
            lm.kept.ledger = cls(lm)
        assert isinstance(lm.kept.ledger, Ledger)
        return lm.kept.ledger

    @property
    def active(self) -> list[Edit]:
        """The edits that are on the model, oldest first."""
        return list(self._active.values())

    def apply(self, edit: Edit, force: bool = False) -> str:
        """Put an edit on the model.

        Args:
            edit: The edit.
            force: Whether to apply it although it was made for other weights.

        Returns:
            Its id, for `undo`.

        Raises:
            UsageError: It is already there, or it names a weight or module that the model does not have.
            WrongBase: It was made for other weights.
            NonFinite: It would leave numbers that are not finite; the model is as before.
        """
        if edit.id in self._active:
            raise UsageError(
                f"The edit {edit.id} is already on {self._lm.name}. Take it back first: undo('{edit.id}')."
            )
        if not force:
            self._check_base(edit)
        self._check_places(edit)
        self._active[edit.id] = edit
        try:
            self._refresh(edit)
            self._check_finite(edit)
        except BaseException:
            del self._active[edit.id]
            self._refresh(edit)
            raise
        return edit.id

    def undo(self, edit_id: str) -> Edit:
        """Take an edit back, whatever came after it.

        Args:
            edit_id: What `apply` returned.

        Returns:
            The edit.

        Raises:
            UsageError: No such edit is on the model.
        """
        if edit_id not in self._active:
            there = ", ".join(self._active) or "none"
            raise UsageError(f"The edit '{edit_id}' is not on {self._lm.name}. Edits on it: {there}.")
        edit = self._active.pop(edit_id)
        self._refresh(edit)
        return edit

    def reset(self) -> list[Edit]:
        """Take all edits back.

        Returns:
            The edits, oldest first.
        """
        edits = self.active
        self._active.clear()
        self._refresh(*edits)
        return edits

    def replace(self, edit_id: str, edit: Edit) -> str:
        """Put an edit in the place of another one, with what came before and after it as it is.

        Args:
            edit_id: The edit that goes.
            edit: The edit that takes its place.

        Returns:
            The id of the new one.

        Raises:
            UsageError: The first is not on the model.
            NonFinite: The second would leave numbers that are not finite; the model is as before.
        """
        if edit_id not in self._active:
            raise UsageError(f"The edit '{edit_id}' is not on {self._lm.name}. Edits on it: {', '.join(self._active)}.")
        before = dict(self._active)
        self._check_places(edit)
        self._active = {edit.id if i == edit_id else i: edit if i == edit_id else e for i, e in before.items()}
        try:
            self._refresh(before[edit_id], edit)
            self._check_finite(edit)
        except BaseException:
            self._active = before
            self._refresh(edit, before[edit_id])
            raise
        return edit.id

    def forget(self) -> None:
        """Leave the weights as they are now and know of no edit any more: what is on the model is the model."""
        for edit in self.active:
            if not isinstance(edit, WeightEdit):
                self.undo(edit.id)
        for kept in (self._active, self._bases, self._prints, self._sums):
            kept.clear()

    def around(self, name: str, wrappers: Sequence[Any]) -> Any:
        """One function for wrappers of a module; what is at hand is used again if they are those on the model.

        Args:
            name: The module.
            wrappers: At least one, oldest first.
        """
        there = [e.wrappers[name] for e in self.active if isinstance(e, ModuleEdit) and name in e.wrappers]
        if name in self._changes and len(there) == len(wrappers) and _begins(there, wrappers):
            return self._changes[name]
        return type(wrappers[0]).combined(list(wrappers))

    def base(self, name: str) -> Tensor:
        """A weight as it was before any edit."""
        return self._bases[name] if name in self._bases else self._lm.model.get_parameter(name).detach()

    def fingerprint(self, name: str) -> str:
        """The fingerprint of a weight as it was before any edit."""
        if name not in self._bases:
            return fingerprint(self.base(name))
        if name not in self._prints:
            self._prints[name] = fingerprint(self._bases[name])
        return self._prints[name]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which the model is as it was before any edit."""
        sums, prints, changes = dict(self._sums), dict(self._prints), dict(self._changes)
        edits = {edit.id: edit for edit in self.reset()}
        try:
            yield
        finally:
            self._active |= edits
            self._sums |= sums
            self._changes |= changes
            self._refresh(*edits.values())
            self._prints |= prints

    def _refresh(self, *edits: Edit) -> None:
        """Bring all that these edits touch in line with the edits that are on the model."""
        for name in dict.fromkeys(name for e in edits if isinstance(e, WeightEdit) for name in e.deltas):
            self._rebuild(name)
        for name in dict.fromkeys(name for e in edits if isinstance(e, ModuleEdit) for name in e.wrappers):
            self._rewrap(name)
        if any(isinstance(edit, PromptEdit) for edit in edits):
            prompts = [e for e in self.active if isinstance(e, PromptEdit)]
            self._lm.rewriters[:] = [in_front(prompts, _asking(self._lm))] if prompts else []
        if any(isinstance(edit, DecodingEdit) for edit in edits):
            self._lm.processors[:] = [e.rule for e in self.active if isinstance(e, DecodingEdit)]
            attach(self._lm)

    @torch.no_grad()
    def _rebuild(self, name: str) -> None:
        """W = base + sum of the active changes of this weight, in fp32 or the weight's own higher precision."""
        weight = self._lm.model.get_parameter(name)
        deltas = [e.deltas[name] for e in self.active if isinstance(e, WeightEdit) and name in e.deltas]
        if not deltas:
            if name in self._bases:
                weight.copy_(self._bases.pop(name))
            self._prints.pop(name, None)
            self._sums.pop(name, None)
            return
        if name not in self._bases:
            self._bases[name] = weight.detach().clone()
        weight.copy_(self._sum(name, deltas))

    def _sum(self, name: str, deltas: list[Delta]) -> Tensor:
        """Base plus changes, from the longest sum at hand that these changes go on from."""
        kept = [pair for pair in self._sums.get(name, []) if _begins(deltas, pair[0])]
        known, total = max(kept, key=lambda pair: len(pair[0]), default=([], self._bases[name]))
        found = total if len(known) == len(deltas) else summed(total, deltas[len(known) :], self.transposed(name))
        if len(deltas) >= LONG:
            self._sums[name] = ([(known, total)] if 0 < len(known) < len(deltas) else []) + [(deltas, found)]
        return found

    def transposed(self, name: str) -> bool:
        """Whether a weight is stored as (d_in, d_out)."""
        return isinstance(self._lm.model.get_submodule(name.rpartition(".")[0]), Conv1D)

    def _rewrap(self, name: str) -> None:
        wrappers = [e.wrappers[name] for e in self.active if isinstance(e, ModuleEdit) and name in e.wrappers]
        if not wrappers:
            self._changes.pop(name, None)
            if name in self._handles:
                self._handles.pop(name).remove()
            return
        known: Any = self._changes.get(name)
        if hasattr(known, "become"):
            known.become(wrappers)
        else:
            self._changes[name] = type(wrappers[0]).combined(wrappers)
        if self._changes[name] is known and name in self._handles:
            return
        if name in self._handles:
            self._handles.pop(name).remove()
        if hasattr(self._changes[name], "board"):
            self._changes[name].board = self._lm.kept.board
        if hasattr(self._changes[name], "attach"):  # it concerns the model as a whole
            self._handles[name] = self._changes[name].attach(self._lm)
            return
        hook = _hook(self._changes[name], self._lm.sequence_first)
        module = self._lm.model.get_submodule(name)
        self._handles[name] = module.register_forward_hook(hook, with_kwargs=True)

    def _check_base(self, edit: Edit) -> None:
        for name, expected in edit.fingerprints.items():
            try:
                found = self.fingerprint(name)
            except AttributeError:
                raise _no_such(name, self._lm) from None
            if found != expected:
                raise WrongBase(
                    f"The edit {edit.id} was made on '{edit.model}', whose weight '{name}' has fingerprint {expected}; "
                    f"that of '{self._lm.name}' has {found}. Load the model it was made for, or pass force=True "
                    "(--force) to apply it all the same."
                )

    def _check_places(self, edit: Edit) -> None:
        for name, delta in edit.deltas.items() if isinstance(edit, WeightEdit) else ():
            try:
                weight = self._lm.model.get_parameter(name)
            except AttributeError:
                raise _no_such(name, self._lm) from None
            shape = tuple(weight.T.shape if self.transposed(name) else weight.shape)
            if not weight.is_floating_point():
                raise UsageError(
                    f"'{name}' of {self._lm.name} is quantised ({weight.dtype}), and a change cannot be added to it. "
                    "Apply the edit to the full-precision checkpoint: it belongs there as well."
                )
            if shape != delta.shape:
                raise WrongBase(
                    f"The edit {edit.id} changes '{name}' as {delta.shape}, but there it is {shape}. "
                    "Load the model the edit was made for."
                )
        if isinstance(edit, ModuleEdit):
            for name in edit.wrappers:
                self._lm.site(name)
                self._check_free(name, edit)
        if isinstance(edit, DecodingEdit) and (layers := layers_of(edit.rule)):
            check_exits(self._lm, layers, edit.method or "The edit")

    def _check_free(self, name: str, edit: ModuleEdit) -> None:
        """Edits of one kind share a module; memories of two kinds would undo each other's work."""
        around = (e for e in self.active if isinstance(e, ModuleEdit) and name in e.wrappers)
        there = next(around, None)
        if there is not None and type(there.wrappers[name]) is not type(edit.wrappers[name]):
            first, second = (e.method or type(e.wrappers[name]).__name__ for e in (there, edit))
            raise UsageError(
                f"'{name}' of {self._lm.name} is already wrapped by the edit {there.id} of {first}; {second} cannot "
                f"share the module with it. Let {second} wrap another module (see its settings), or first take back "
                f"what {first} has put there: rollback('{there.id}')."
            )

    def _check_finite(self, edit: Edit) -> None:
        for name in edit.deltas if isinstance(edit, WeightEdit) else ():
            weight = self._lm.model.get_parameter(name)
            if not torch.isfinite(weight).all():
                raise NonFinite(
                    f"The edit {edit.id} leaves values in '{name}' that are not finite numbers; it was taken back. "
                    "Lower the learning rate or the clamp, or use a wider dtype."
                )


@contextmanager
def applied(lm: LM, edit: Edit) -> Iterator[LM]:
    """A context in which an edit is on a model; after it the model is as before, bit for bit, also on an error."""
    ledger = Ledger.of(lm)
    edit_id = ledger.apply(edit, force=True)
    try:
        yield lm
    finally:
        ledger.undo(edit_id)


def summed(base: Tensor, deltas: list[Delta], transposed: bool) -> Tensor:
    """A weight with changes added, in the weight's orientation.

    Args:
        base: The untouched weight as its module stores it.
        deltas: Changes as (d_out, d_in).
        transposed: Whether the module stores (d_in, d_out).

    Returns:
        The new weight, in fp32 or the base's own higher precision; the weight rounds it once.
    """
    total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    matrix = total.T if transposed else total
    for delta in deltas:
        delta.add_to(matrix)
    return total


def _begins(items: Sequence[Any], known: Sequence[Any]) -> bool:
    return len(known) <= len(items) and all(a is b for a, b in zip(known, items, strict=False))


def _asking(lm: LM) -> Ask:
    """What the model goes on with after a text, whatever prompt edits are on it."""

    def ask(text: str, tokens: int) -> str:
        return lm.text.decode(continuations(lm, [list(lm.text.encode(lm.text.render(text)).ids)], tokens)[0])

    return ask


def fingerprints(lm: LM, edit: Edit) -> Mapping[str, str]:
    """The fingerprints of the untouched weights that an edit touches."""
    ledger = Ledger.of(lm)
    names = list(edit.deltas) if isinstance(edit, WeightEdit) else []
    names += [f"{name}.weight" for name in edit.wrappers] if isinstance(edit, ModuleEdit) else []
    return {name: ledger.fingerprint(name) for name in names}


def _hook(change: Callable[[Tensor, Tensor], Tensor], sequence_first: bool) -> Callable[..., Any]:
    """What puts a change in place; it sees rows before positions, however the model lays its states out."""

    def turned(states: Tensor) -> Tensor:
        return states.transpose(0, 1) if sequence_first and states.dim() == 3 else states

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taken, states = turned(hidden(args if args else kwargs)), turned(hidden(output))
        return with_hidden(output, turned(change(taken, states)))

    return after


def _no_such(name: str, lm: LM) -> WrongBase:
    return WrongBase(
        f"The edit changes '{name}', and {lm.name} has no such weight. Load the model that the edit was made for."
    )
