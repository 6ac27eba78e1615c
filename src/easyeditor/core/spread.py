"""Writing values into several blocks, lowest first: keys and residuals on the model with what is written so far.

What is still missing of a target after the blocks below have been written is divided among the blocks that are left.
Each pass begins at the lowest block that has changed; where that would keep too much in memory, at the bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from easyeditor.core.prompts import Fact, Row, fact_row
from easyeditor.core.solve import Solution
from easyeditor.edits.delta import Delta
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import applied
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import add_at, by_row, capture, stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.resume import Cut, cut_at, resumed
from easyeditor.lm.structure import Site
from easyeditor.lm.text import pad

CHUNK = 8192  # tokens per pass
KEPT = 2**28  # bytes of hidden states that may wait for the next block's pass

Rows = Literal["bare", "contexts"]


@dataclass(frozen=True)
class Write:
    """Projections of one kind, one per block, and what they are to bring about.

    Args:
        sites: The projections, lowest block first.
        modules: Where the target of each stands; the last block for all of them, or each its own.
        targets: What has to be added there, one per site, each (width, facts).
    """

    sites: Sequence[Site]
    modules: Sequence[nn.Module]
    targets: Sequence[Tensor]


@dataclass
class Written:
    """What was written.

    Args:
        deltas: Weight name -> change.
        keys: Weight name -> K, (d_in, facts), fp32.
        residuals: Weight name -> R, (d_out, facts), fp32.
        factors: Weight name -> the factor of the small system, (facts, facts), fp64.
        solved: Weight name -> condition number and relative residual of its system.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    solved: dict[str, dict[str, float]] = field(default_factory=dict)

    def edit(self, **notes: Any) -> WeightEdit:
        """All of it as an edit."""
        return WeightEdit(
            deltas=self.deltas,
            keys=self.keys,
            residuals=self.residuals,
            factors=self.factors,
            notes={**notes, "solved": self.solved},
        )


def spread(
    lm: LM,
    facts: Sequence[Fact],
    layers: Sequence[int],
    writes: Sequence[Write],
    solve: Callable[[Site, Tensor, Tensor], Solution],
    *,
    share: Callable[[int], float] = float,
    rows: Rows = "bare",
) -> Written:
    """Write facts into blocks.

    Args:
        lm: The model; it is left as it was.
        facts: The facts.
        layers: The blocks, lowest first.
        writes: What is written there; several kinds of projections are written at the same time.
        solve: From a site, keys (d_in, facts) and residuals (d_out, facts) to a change.
        share: By what the missing part is divided when so many blocks are left; the identity in MEMIT.
        rows: Where the missing part is read: in the bare prompts, or in the mean over the texts in front (NAMET).

    Returns:
        The changes, each solved on the model with those before it.
    """
    reader = Reader(lm, facts)
    out = Written()
    modules = list({id(m): m for write in writes for m in write.modules}.values())
    start: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for j, layer in enumerate(layers):
            sites = [write.sites[j] for write in writes]
            single = len(layers) == 1
            keys, states = reader.read(sites, [] if single else modules, layers[-1], record_at=layer, rows=rows)
            now = {id(m): s for m, s in zip(modules, states, strict=False)}
            start = start or now
            left = len(layers) - j
            for write in writes:
                k, at = keys[write.sites[j].weight_name], id(write.modules[j])
                moved = now[at] - start[at] if j else 0.0
                residual = (write.targets[j].to(k) - moved) / share(left)
                solved_into(out, write.sites[j], k, residual, solve(write.sites[j], k, residual))
            if left > 1:
                draft = {s.weight_name: out.deltas[s.weight_name] for s in sites}
                stack.enter_context(applied(lm, WeightEdit(deltas=draft)))
    return out


def solved_into(out: Written, site: Site, keys: Tensor, residuals: Tensor, found: Solution) -> None:
    """Note the solution at a site."""
    name = site.weight_name
    out.deltas[name], out.keys[name], out.residuals[name] = found.delta, keys, residuals
    out.solved[name] = {"condition": found.condition, "residual": found.residual}
    if found.factor is not None and len(found.factor) > 1:
        out.factors[name] = found.factor


@dataclass
class _Chunk:
    """Some facts as one padded batch, up to the subject's last token."""

    ids: Tensor
    mask: Tensor
    at: Tensor  # the subject's last token, (rows,)
    owner: Tensor  # which fact of the chunk, (rows,)
    key_weights: Tensor  # (rows, facts in the chunk)
    bare_weights: Tensor
    context_weights: Tensor
    cut: Cut | None = None


class Reader:
    """Reads keys and states of facts at the subject's last token; nothing after the subject is run.

    Args:
        lm: The model.
        facts: The facts.
    """

    def __init__(self, lm: LM, facts: Sequence[Fact]) -> None:
        self.lm = lm
        self.chunks = [_chunk(lm, group) for group in _groups(lm, facts)]
        tokens = sum(chunk.ids.numel() for chunk in self.chunks)
        self.keeps = tokens * lm.width * lm.dtype.itemsize <= KEPT

    @spent("keys")
    @torch.no_grad()
    def read(
        self,
        sites: Sequence[Site],
        modules: Sequence[nn.Module],
        top: int,
        record_at: int,
        rows: Rows = "bare",
        inject: tuple[nn.Module, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Keys at sites, and what modules return.

        Args:
            sites: Projections.
            modules: Modules in the blocks up to ``top``.
            top: The last block that is needed.
            record_at: The block from which on the next reading will find something changed.
            rows: See `spread`.
            inject: A module and what is added to its output for each fact, (width, facts).

        Returns:
            Weight name -> keys, (d_in, facts), and for each module (width, facts); both fp32.
        """
        lm = self.lm
        keys: dict[str, list[Tensor]] = {site.weight_name: [] for site in sites}
        states: list[list[Tensor]] = [[] for _ in modules]
        last = sites[0].module if len(sites) == 1 and not modules else lm.blocks[top]
        done = 0
        for chunk in self.chunks:
            with ExitStack() as stack:
                if inject is not None:
                    each = inject[1].T[done : done + chunk.bare_weights.shape[1]]  # (facts, width)
                    added = each[chunk.owner.to(each.device)]
                    stack.enter_context(add_at(inject[0], chunk.at, added, lm.sequence_first))
                if chunk.cut is not None:
                    stack.enter_context(resumed(lm, chunk.cut, chunk.cut.states))
                cut = stack.enter_context(cut_at(lm, record_at))
                taken = [stack.enter_context(capture(site.module, "input")) for site in sites]
                given = [stack.enter_context(capture(module)) for module in modules]
                stack.enter_context(stop_after(last))
                lm.run(chunk.ids, chunk.mask)
            if self.keeps and record_at:
                chunk.cut = cut
            done += chunk.bare_weights.shape[1]
            which = chunk.bare_weights if rows == "bare" else chunk.context_weights
            for site, seen in zip(sites, taken, strict=True):
                keys[site.weight_name].append(self._mean(seen, chunk, chunk.key_weights))
            for found, seen in zip(states, given, strict=True):
                found.append(self._mean(seen, chunk, which))
        return {n: torch.cat(k, dim=1) for n, k in keys.items()}, [torch.cat(s, dim=1) for s in states]

    def _mean(self, seen: list[Tensor], chunk: _Chunk, weights: Tensor) -> Tensor:
        """The weighted means over the rows of each fact, (width, facts)."""
        states = by_row(seen[0], len(chunk.ids), self.lm.sequence_first)
        rows = torch.arange(len(chunk.ids), device=states.device)
        return states[rows, chunk.at.to(states.device)].float().T @ weights.to(states.device)


def _groups(lm: LM, facts: Sequence[Fact]) -> Iterator[list[tuple[Fact, list[Row]]]]:
    """Facts with their rows, as many as make one chunk."""
    group: list[tuple[Fact, list[Row]]] = []
    count = longest = 0
    for fact in facts:
        rows = [fact_row(lm, request, text) for request in fact.requests for text in fact.contexts]
        length = max(row.subject + 1 for row in rows)
        if group and (count + len(rows)) * max(longest, length) > CHUNK:
            yield group
            group, count, longest = [], 0, 0
        group.append((fact, rows))
        count, longest = count + len(rows), max(longest, length)
    if group:
        yield group


def _chunk(lm: LM, group: list[tuple[Fact, list[Row]]]) -> _Chunk:
    rows = [row for _, found in group for row in found]
    ids, mask = pad([row.ids[: row.subject + 1] for row in rows], lm.text.pad_id, "right", lm.device)
    weights = torch.zeros(3, len(rows), len(group))
    i = 0
    for f, (fact, _) in enumerate(group):
        per_request, each = len(fact.contexts), 1.0 / len(fact.requests)
        for _ in fact.requests:
            bare, others = i, slice(i + 1, i + per_request)
            weights[:2, bare, f] = each
            if per_request > 1:  # a key is half that of the bare prompt and half the mean over the texts in front
                weights[0, bare, f] = each / 2
                weights[0, others, f] = each / 2 / (per_request - 1)
                weights[2, others, f] = each / (per_request - 1)
            else:
                weights[2, bare, f] = each
            i += per_request
    key, bare_only, contexts = weights.to(lm.device)
    owner = torch.tensor([f for f, (_, found) in enumerate(group) for _ in found])
    return _Chunk(ids, mask, torch.tensor([row.subject for row in rows]), owner, key, bare_only, contexts)
