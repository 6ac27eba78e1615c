"""Many facts in one edit: their tokens, some facts at a time, and training in two stages. arXiv:2311.04661.

What a loss has to do with the editor it has through the changes of the weights alone. First it is differentiated by
the changes, some facts at a time, and the editor has no part in it; then that gradient goes through the editor, and the
model has no part in it. Neither stage holds what the other needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.core.gradients import Factors, factors
from easyeditor.core.hypernetwork import with_gradient
from easyeditor.core.likelihood import answers, mean_per_row
from easyeditor.core.rehearsal import Before, Outcome, Rows, asked_again, plain_precision
from easyeditor.core.training import TOTAL, Visit
from easyeditor.lm.model import LM
from easyeditor.lm.resume import with_weight
from easyeditor.lm.structure import Site
from easyeditor.requests import EditRequest

Changes = Mapping[str, Tensor]  # weight name -> (d_out, d_in)


def tokens_of(
    lm: LM, sites: Sequence[Site], requests: Sequence[EditRequest], tokens: str, at_once: int
) -> Iterator[dict[str, Factors]]:
    """The factors of the loss of new answers: the mean over each answer's tokens of -log p.

    Args:
        lm: The model.
        sites: The projections.
        requests: What is to be learnt.
        tokens: See `easyeditor.core.gradients.factors`.
        at_once: Requests per pass.

    Yields:
        For each pass, weight name -> the factors of tokens with a gradient.
    """
    for start in range(0, len(requests), at_once):
        part = requests[start : start + at_once]
        batch = answers(lm, [(lm.text.render(request.prompt), request.target_new) for request in part])
        with plain_precision(lm):
            found = factors(lm, sites, batch, tokens, lambda logp, batch=batch: -mean_per_row(logp, batch).sum())  # type: ignore[misc]
        yield {site.weight_name: with_gradient(found[site.name]) for site in sites}


@contextmanager
def changed(sites: Sequence[Site], changes: Changes) -> Iterator[None]:
    """A context in which projections use their weights with changes, through which gradients flow."""

    def sum_at(site: Site) -> Callable[[], Tensor]:
        return lambda: site.matrix() + changes[site.weight_name]

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(with_weight(site.module, sum_at(site)))
        yield


@dataclass(frozen=True, eq=False)
class Lessons:
    """The first stage.

    Args:
        before: What the untouched model says; its projections are those that change.
        wordings: How many other wordings of a fact the new answer is asked for in, per visit.
        probes: How many probes of a fact, per visit.
        loc: The weight of the divergence on what must not move.
        at_once: Facts per pass.
    """

    before: Before
    wordings: int
    probes: int
    loc: float
    at_once: int

    def __call__(
        self, visits: Sequence[Visit], edited: Sequence[Visit], changes: Changes
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the model says of some facts after changes.

        Args:
            visits: The facts.
            edited: All that the changes were made for; none of them is a probe.
            changes: Of the weights; where they came from does not count.

        Returns:
            The means over the facts, by name; and the gradient of ``loss/total`` by each change, where gradients are
            wanted.
        """
        leaves = {name: each.detach().float().requires_grad_() for name, each in changes.items()}
        gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        sums: dict[str, Tensor] = {}
        prompts = self.before.prompts(edited)
        for start in range(0, len(visits), self.at_once):
            found = self._part(visits[start : start + self.at_once], prompts, leaves)
            if torch.is_grad_enabled():
                parts = torch.autograd.grad(found[TOTAL].sum() / len(visits), list(leaves.values()))
                for name, part in zip(leaves, parts, strict=True):
                    gradients[name] += part
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + values.detach().sum()
        return {name: value / len(visits) for name, value in sums.items()}, gradients

    def _part(self, visits: Sequence[Visit], edited: Set[str], changes: Changes) -> dict[str, Tensor]:
        """The losses of each of some facts, (facts,)."""
        rows = self.before.anew(visits, edited, self.wordings, self.probes)
        with changed(self.before.sites, changes):
            outcome = asked_again(self.before.lm, self.before.sites, rows)
        found = outcome.per_edit(len(visits))
        total = found["loss/edit"] + self.loc * found["loss/loc"]
        return {**found, "ES": _own(rows, outcome), "loss/total_edit": total.detach(), TOTAL: total}


def _own(rows: Rows, outcome: Outcome) -> Tensor:
    """Whether the new answer is given to the fact's own prompt, (facts,)."""
    first = torch.tensor([place == 0 for place in rows.places])[rows.asked]
    return outcome.right[first.to(outcome.right.device)]


def carried(changes: Changes, gradients: Changes) -> Tensor:
    """The second stage: 0, with the gradient that a loss has whose gradients by the changes are given."""
    total = torch.stack([(each * gradients[name].to(each)).sum() for name, each in changes.items()]).sum()
    return (total - total.detach()).float()
