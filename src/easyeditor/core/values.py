"""The value v* of a fact at a place in the model: what must be written there for the new answer to follow.

    min over d:  mean over contexts of -log p(target | context + prompt, h + d)  +  kl_factor KL(p_now || p_before)
                 +  v_weight_decay |d| / |v|^2,      |d| <= clamp |v|                        (ROME, equation 4)

The vector d enters at the subject's last token only. So blocks below the place, and all tokens before the subject's
last one, are the same in every step: they are computed once, tokens as cached keys and values. What is left of a step
are the blocks above, the tokens from the subject on, and the head at the target's positions. The first step, at d = 0,
is compared with the full pass; a model with which the short way does not agree is run in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from easyeditor.core.learn import descend
from easyeditor.core.prompts import Row, essence_row, fact_row
from easyeditor.lm.hooks import add_at, by_row, capture, stop_after
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.resume import Cut, cut_at, head_at, resumed
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)

CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # how a model says that it lacks a way


@dataclass(frozen=True)
class ValueSettings:
    """How values are optimised.

    Args:
        steps: Forward passes.
        lr: Adam's step size.
        weight_decay: Factor of ``|d| / |v|^2``.
        clamp: The largest ``|d| / |v|``.
        kl_factor: Factor of the divergence on ``{subject} is a``.
        stop_loss: A loss below which the value is found.
        place: ``mlp``: the output of the MLP's projection; ``block``: the residual stream after the block.
        suffix_only: Whether to recompute only what changes; the result is the same.
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl_factor: float
    stop_loss: float = 5e-2
    place: str = "mlp"
    suffix_only: bool = True


@dataclass(frozen=True)
class Value:
    """An optimised value.

    Args:
        delta: d, (width,), fp32.
        before: v, what stood there in the bare prompt, (width,), fp32.
        losses: The loss of each step.
    """

    delta: Tensor
    before: Tensor
    losses: list[float]


def values(
    lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Sequence[str], settings: ValueSettings
) -> list[Value]:
    """Optimise the values of facts, each for itself, all in one batch.

    Args:
        lm: The model; it is left as it was.
        requests: The facts.
        layer: The block at which to write.
        contexts: Texts with ``{}`` where the prompt goes, the bare one first.
        settings: How.

    Returns:
        One value per request.

    Raises:
        UsageError: The model reads the prompt in an encoder, or a subject is missing.
    """
    problem = _Problem(lm, requests, layer, contexts, settings)
    with lm.frozen():
        return problem.solve()


class _Problem:
    """The rows of all facts, aligned so that the subject's last token stands in one column.

    A model that padding on the left would move gets rows that begin in one column instead.
    """

    def __init__(
        self, lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Sequence[str], settings: ValueSettings
    ) -> None:
        self.lm, self.layer, self.settings, self.count = lm, layer, settings, len(requests)
        facts = [[fact_row(lm, request, context, request.target_new) for context in contexts] for request in requests]
        essences = [essence_row(lm, request) for request in requests]
        self.rows: list[Row] = [row for found in facts for row in found] + essences
        owners = [i for i, found in enumerate(facts) for _ in found] + list(range(self.count))
        device = lm.device
        self.owner = torch.tensor(owners, device=device)  # (rows,)
        self.bare = [i * len(contexts) for i in range(self.count)]
        self._align(device)
        self._aim(len(contexts), device)

    def _align(self, device: torch.device) -> None:
        """Rows padded left up to the subject's last token, if that is allowed, and right after the last one needed."""
        inputs = [
            row.ids[: len(row.ids) - 1] if row.first < len(row.ids) else row.ids[: row.subject + 1] for row in self.rows
        ]
        last = max(row.subject for row in self.rows)
        self.starts = [last - row.subject if self.lm.pads_left else 0 for row in self.rows]
        self.prefix = min(start + row.subject for start, row in zip(self.starts, self.rows, strict=True))
        self.columns = torch.tensor([start + row.subject for start, row in zip(self.starts, self.rows, strict=True)])
        length = max(start + len(ids) for start, ids in zip(self.starts, inputs, strict=True))
        self.ids = torch.full((len(inputs), length), self.lm.text.pad_id)
        self.mask = torch.zeros((len(inputs), length), dtype=torch.long)
        for i, (ids, start) in enumerate(zip(inputs, self.starts, strict=True)):
            self.ids[i, start : start + len(ids)] = torch.tensor(ids)
            self.mask[i, start : start + len(ids)] = 1
        self.ids, self.mask, self.columns = self.ids.to(device), self.mask.to(device), self.columns.to(device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def _aim(self, per_fact: int, device: torch.device) -> None:
        """Which logits are needed: before each target token, and at the subject's last token of the essence rows."""
        at: list[tuple[int, int, int, float]] = []
        for i, row in enumerate(self.rows[: self.count * per_fact]):
            labels = row.ids[row.first :]
            weight = 1.0 / (len(labels) * per_fact)
            at += [(i, self.starts[i] + row.first - 1 + j, label, weight) for j, label in enumerate(labels)]
        self.targets = len(at)
        essences = range(self.count * per_fact, len(self.rows))
        essence = [(i, self.starts[i] + self.rows[i].subject) for i in essences]
        self.at_rows = torch.tensor([a[0] for a in at] + [e[0] for e in essence], device=device)
        self.at_columns = torch.tensor([a[1] for a in at] + [e[1] for e in essence], device=device)
        self.labels = torch.tensor([a[2] for a in at], device=device)  # (targets,)
        self.weights = torch.tensor([a[3] for a in at], device=device)  # (targets,)

    def solve(self) -> list[Value]:
        lm, settings = self.lm, self.settings
        site = lm.mlp_out(self.layer).module if settings.place == "mlp" else lm.blocks[self.layer]
        with (
            torch.no_grad(),
            capture(site) as outputs,
            cut_at(lm, self.layer + 1) as above,
            cut_at(lm, self.layer) as own,
        ):
            logits, cache = self._recorded()
        states = by_row(outputs[-1], len(self.rows), lm.sequence_first)
        before = states[self.bare, self.columns[self.bare].to(states.device)].float()  # (facts, width)
        kl_before = self._log_probs(logits)[self.targets :]
        forward = self._short_way(cache, above, own, logits)
        delta = torch.zeros_like(before)
        size: Tensor = before.norm(dim=1)

        def losses() -> Tensor:
            logp = self._log_probs(forward(delta))
            gold = logp[: self.targets].gather(1, self.labels[:, None].to(logp.device)).squeeze(1)
            owner = self.owner[self.at_rows[: self.targets]].to(logp.device)
            weighted = -gold * self.weights.to(logp.device)
            nll = torch.zeros(self.count, device=logp.device).index_add(0, owner, weighted)
            now = logp[self.targets :]
            kl = (now.exp() * (now - kl_before)).sum(-1)  # KL(p_now || p_before), (facts,)
            decay: Tensor = delta.norm(dim=1) / size**2
            return nll + settings.kl_factor * kl + settings.weight_decay * decay.to(logp.device)

        def clamp() -> None:
            largest = settings.clamp * size
            delta.mul_((largest / delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None])

        trace = descend(
            [delta], losses, steps=settings.steps, lr=settings.lr, stop_below=settings.stop_loss, project=clamp
        )
        return [Value(delta[i], before[i], [step[i] for step in trace]) for i in range(self.count)]

    def _log_probs(self, logits: Tensor) -> Tensor:
        logp: Tensor = logits.float().log_softmax(-1)
        return logp

    def _recorded(self) -> tuple[Tensor, DynamicCache | None]:
        """The full pass as the model is, with the keys and values of all tokens if it keeps them in a known way."""
        if self.settings.suffix_only and "past_key_values" in self.lm.accepts:
            try:
                return self._full(None, DynamicCache())
            except CANNOT as error:
                log.debug("%s cannot fill a plain cache: %s", self.lm.name, error)
        return self._full(None)

    def _full(self, delta: Tensor | None, cache: DynamicCache | None = None) -> tuple[Tensor, DynamicCache | None]:
        """The plain way: everything, with the vector added by a hook. Logits at the needed positions."""
        with ExitStack() as stack:
            at = stack.enter_context(head_at(self.lm, self.at_rows, self.at_columns))
            if delta is not None:
                stack.enter_context(self._adding(delta))
            out = self.lm.run(self.ids, self.mask, position_ids=self.positions, past=cache, use_cache=cache is not None)
        return at.logits(logits_of(out)), cache

    def _adding(self, delta: Tensor, start: int = 0) -> ExitStack:
        """A context in which the vectors are added, in a pass over the columns from ``start`` on."""
        lm = self.lm
        module = lm.mlp_out(self.layer).module if self.settings.place == "mlp" else lm.blocks[self.layer]
        stack = ExitStack()
        stack.enter_context(add_at(module, self.columns - start, delta[self.owner.to(delta.device)], lm.sequence_first))
        return stack

    def _short_way(
        self, cache: DynamicCache | None, above: Cut, own: Cut, expected: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """The fastest way that agrees with the full pass.

        From above the block or from the block itself, on the tokens from the subject on or on all; or else in full.
        """
        zero = torch.zeros(self.count, self.lm.width, device=self.lm.device)
        past = [cache, None] if cache is not None else [None]
        for kept, (cut, inject) in product(past, ((above, True), (own, False)) if self.settings.suffix_only else ()):
            if cut.output is None and cut.first:
                continue
            if inject and self.settings.place == "mlp" and not self._adds_up(above):
                continue
            try:
                suffix = _Suffix(self, cut, kept, inject)
                with torch.no_grad():
                    found = suffix(zero)
            except CANNOT as error:
                log.debug("The suffix of %s cannot be run alone: %s", self.lm.name, error)
                continue
            scale = expected.float().abs().max()
            bound = 1e-4 if expected.dtype == torch.float32 else 3e-2
            if (found.float() - expected.float()).abs().max() <= bound * scale:
                return suffix
        if self.settings.suffix_only:
            log.info("%s is run in full in every step of the value optimisation.", self.lm.name)
        return lambda delta: self._full(delta)[0]

    def _adds_up(self, above: Cut) -> bool:
        """Whether what is added to the MLP's output arrives unchanged at the block's output (no norm in between)."""
        probe = torch.randn(self.lm.width, generator=torch.Generator().manual_seed(0)).to(self.lm.device)
        probe = probe * above.states.float().norm(dim=-1).max() / probe.norm()
        module = self.lm.mlp_out(self.layer).module
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            moved = stack.enter_context(capture(self.lm.blocks[self.layer]))
            stack.enter_context(add_at(module, self.columns[:1], probe, self.lm.sequence_first))
            stack.enter_context(stop_after(self.lm.blocks[self.layer]))
            self.lm.run(self.ids[:1], self.mask[:1], position_ids=self.positions[:1])
        change = (by_row(moved[0], 1, self.lm.sequence_first) - above.states[:1]).float()[0, self.columns[0]]
        tolerance = 1e-4 if above.states.dtype == torch.float32 else 3e-2
        return bool((change - probe).abs().max() <= tolerance * probe.abs().max())


class _Suffix:
    """Logits from the blocks above a cut, on the tokens from the subject's last one on if there is a cache."""

    def __init__(self, problem: _Problem, cut: Cut, cache: DynamicCache | None, inject: bool) -> None:
        self.problem, self.inject = problem, inject
        layers: list[Any] = list(cache.layers) if cache is not None else []
        p = self.start = problem.prefix if layers else 0
        self.cut = with_columns(cut, p) if cut.first else cut
        self.prefix = [(layer.keys[:, :, :p], layer.values[:, :, :p]) for layer in layers]

    def __call__(self, delta: Tensor) -> Tensor:
        problem, lm, p = self.problem, self.problem.lm, self.start
        with ExitStack() as stack:
            states = self.cut.states if self.cut.first else None
            if self.inject and states is not None:
                states = states.index_put(
                    (torch.arange(len(states), device=states.device), (problem.columns - p).to(states.device)),
                    delta[problem.owner.to(delta.device)].to(states),
                    accumulate=True,
                )
            if states is not None:
                stack.enter_context(resumed(lm, self.cut, states))
            if not self.inject:
                stack.enter_context(problem._adding(delta, p))
            at = stack.enter_context(head_at(lm, problem.at_rows, problem.at_columns - p))
            out = lm.run(
                problem.ids[:, p:],
                problem.mask,
                position_ids=problem.positions[:, p:],
                past=_cache(self.prefix) if p else None,
                use_cache=p > 0,
            )
        return at.logits(logits_of(out))


def with_columns(cut: Cut, start: int) -> Cut:
    """A cut with the columns from one on."""
    return Cut(cut.first, cut.carrying(cut.states[:, start:].contiguous()), cut.sequence_first)


def _cache(prefix: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds keys and values of the prefix; built anew for each pass, because a pass appends to it."""
    cache = DynamicCache()
    for keys, states in prefix:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, states)
        layer.keys, layer.values = keys, states
        cache.layers.append(layer)
    return cache
