"""DEFER: a gate that hands over to a corrector, the baseline of GRACE. Hartvigsen et al., NeurIPS 2023.

arXiv:2211.11031

Idea      Beside one projection of a frozen model stand a linear gate and a linear corrector. Where the gate is open,
          what the corrector says takes the place of what the projection returns.
Equation  g(x) = sigmoid(w x + b);  h(x) = P x + c  if g(x) >= threshold,  else f(x);  trained as g h + (1 - g) f.
Changes   No weight; one module is wrapped.
Needs     Nothing but prompt and answer.
Relations GRACE opens by distance, and its value does not depend on x.
Deviates  Gate and corrector are consulted at every position and act there alone, so that nothing depends on padding,
          batching or the KV cache; the authors' act on all positions when the last one opens the gate. An edit has a
          gate and a corrector of its own, and the nearest open gate decides: the authors train one pair on and on,
          which forgets, and from which no edit can be taken back. The gate looks along the edit's own query, at x
          brought to unit length, and opens within `margin` of it; only its slope is trained: theirs is trained without
          one example of what to leave alone and opens for almost everything. The corrector starts at the projection's
          own weights and not at random ones. From there Adam, which sees one query only, changes P by the outer product
          of a vector with the signs of the query, and c by that vector: so this vector is what is trained and kept.
          Training ends at a loss of 5e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.balls import SAME, Memory
from easyeditor.core.learn import descend
from easyeditor.core.likelihood import mean_per_row
from easyeditor.core.nearest import Stack
from easyeditor.core.tail import Tail, returned, tail_of
from easyeditor.edits.edit import Edit, ModuleEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.hooks import fused_activations
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest

SOLVED = 5e-3
OPEN = 4.0  # how far beyond the threshold, in logits, a gate begins at its own query


@dataclass(kw_only=True)
class DeferHyperParams(HyperParams):
    """Settings of DEFER."""

    alg_name: str = "DEFER"
    inner_params: list[str] = field(default_factory=list)  # the weight of the projection; empty: preset, else by depth
    edit_lr: float = 7e-5  # Adam's step size for gate and corrector
    n_iter: int = 100  # steps
    threshold: float = 0.5  # how open the gate must be, between 0 and 1
    margin: float = 0.1  # one minus the cosine up to which a state opens the gate, before training

    def check(self) -> None:
        """Values that make sense."""
        if not 0 < self.threshold < 1:
            raise UsageError(f"Setting 'threshold' of DEFER is {self.threshold:g}. Choose one between 0 and 1.")
        if not 0 < self.margin < 2:
            raise UsageError(f"Setting 'margin' of DEFER is {self.margin:g}. Choose one between 0 and 2.")
        if len(self.inner_params) > 1:
            raise UsageError("Setting 'inner_params' of DEFER names several weights. Name one: it wraps one module.")


@dataclass(frozen=True)
class Deferral:
    """The gate and the corrector of an edit. A wrapper of a `ModuleEdit`.

    Args:
        query: What the projection took in at the prompt's last token, (d_in,).
        shift: What the corrector adds to the projection, per unit of ``sign(query) x + 1``, (d_out,).
        slope: Of the gate, per unit of the cosine.
        offset: The cosine at which the gate is half open.
        threshold: How open it must be.
    """

    query: Tensor
    shift: Tensor
    slope: float
    offset: float
    threshold: float

    distance: ClassVar[str] = "cos"

    @property
    def radius(self) -> float:
        """One minus the cosine up to which the gate is open enough."""
        return max(1 - self.offset - logit(self.threshold) / self.slope, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """Query and shift."""
        return {"query": self.query, "shift": self.shift}

    def config(self) -> dict[str, Any]:
        """The gate."""
        return {"slope": self.slope, "offset": self.offset, "threshold": self.threshold}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Deferral:
        """The pair with these tensors and settings."""
        return cls(tensors["query"], tensors["shift"], **config)

    @classmethod
    def combined(cls, wrappers: list[Deferral]) -> Callable[[Tensor, Tensor], Tensor]:
        """One function for all edits of a module, oldest first."""
        found = Deferrals(wrappers[0])
        found.become(wrappers)
        return found


class Deferrals(Memory):
    """All gates and correctors of a module.

    Args:
        first: One of them, for the widths.
    """

    alike = ()

    def __init__(self, first: Deferral) -> None:
        super().__init__(len(first.query), "cos", first.query.device)
        self._shifts = Stack(len(first.shift), device=first.shift.device)

    def become(self, entries: Sequence[Deferral]) -> None:
        """Be the memory of these entries, oldest first; see `Memory.follow`."""
        self.follow(entries, self._add)

    def _add(self, entry: Deferral) -> None:
        """One more pair; at one and the same query the newer one holds."""
        distances, nearest = self.nearest(entry.query.to(self.keys.device)[None], SAME * SAME)
        if len(self) and distances[0].isfinite():
            self.change(int(nearest[0]), -1.0)
        self.append(entry.query.to(self.keys.device), entry.radius)
        self._shifts.append(entry.shift)

    def cut(self, count: int) -> None:
        """Keep the first pairs only."""
        super().cut(count)
        self._shifts.cut(count)

    def to(self, device: torch.device) -> None:
        """Move all of it, if it is elsewhere."""
        super().to(device)
        self._shifts.to(device)

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        """What the projection returns, with the correctors in place where a gate is open.

        Args:
            states: What it took in, (..., d_in).
            output: What it returned, (..., d_out).
        """
        flat = states.reshape(-1, states.shape[-1])
        index = self.met(flat)
        (places,) = (index >= 0).nonzero(as_tuple=True)
        if not len(places):
            return output
        which = index[places]
        amount = corrector_input(self.keys[which], flat[places].float())
        changed = output.reshape(-1, output.shape[-1]).clone()
        changed[places] += (amount[:, None] * self._shifts.rows[which]).to(changed)
        return changed.reshape(output.shape)


def corrector_input(queries: Tensor, states: Tensor) -> Tensor:
    """What a corrector's shift is multiplied by: sign(query) x + 1.

    Args:
        queries: (n, d_in).
        states: x, (n, d_in).

    Returns:
        (n,).
    """
    return (queries.sign() * states).sum(dim=-1) + 1


def logit(share: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(share / (1 - share))


@method("DEFER", hparams=DeferHyperParams, paper="arXiv:2211.11031", requests="one", kind="module", wrapper=Deferral)
def defer(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: DeferHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> ModuleEdit:
    """The gate and the corrector of one fact."""
    request, site = requests[0], lm.site(hparams.inner_params[0])
    with lm.frozen(), fused_activations(lm.model):
        tail = tail_of(lm, site, [(lm.text.render(request.prompt), request.target_new)])
        query = tail.inputs[0]
        own = returned(site, query[None])[0].float()  # without what earlier edits put there
        slope = torch.tensor([(max(logit(hparams.threshold), 0.0) + OPEN) / hparams.margin], device=own.device)
        shift = torch.zeros_like(own)
        losses = _train(tail, own, shift, slope, hparams)
    pair = Deferral(query, shift, float(slope), 1 - hparams.margin, hparams.threshold)
    return ModuleEdit(wrappers={site.name: pair}, notes={"losses": losses, "radius": pair.radius})


def _train(tail: Tail, own: Tensor, shift: Tensor, slope: Tensor, hparams: DeferHyperParams) -> list[float]:
    """Adam on shift and slope, with the soft mixture g h + (1 - g) f at the prompt's last token."""
    amount = corrector_input(tail.inputs[:1], tail.inputs[:1])
    first = (tail.order() == 0)[:, None]
    least = (max(logit(hparams.threshold), 0.0) + 1) / hparams.margin  # the gate stays open at its own query

    def change(states: Tensor) -> Tensor:
        mixed = own + torch.sigmoid(slope * hparams.margin) * shift * amount
        return torch.where(first.to(states.device), mixed.to(states), states)

    def losses() -> Tensor:
        return -mean_per_row(tail.log_probs(change), tail.batch)

    def kept_open() -> None:
        slope.clamp_(min=least)

    steps, bound = hparams.n_iter + 1, SOLVED
    trace = descend([shift, slope], losses, steps=steps, lr=hparams.edit_lr, stop_below=bound, project=kept_open)
    return [step[0] for step in trace]
