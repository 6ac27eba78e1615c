"""The value v* of a fact at a place in the model: what must be written there for the new answer to follow.

    min over d:  mean over contexts of -log p(target | context + prompt, h + d)  +  kl_factor KL(p_now || p_before)
                 +  v_weight_decay |d| / |v|^2,      |d| <= clamp |v|                        (ROME, equation 4)

Facts are independent problems: those of similar length are optimised in one batch, and one that has converged leaves
it. What a step need not compute again is in `easyeditor.core.suffix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from easyeditor.core.learn import Problems
from easyeditor.core.losses import Step, decay, kl, leads, log_probs, nll, probability
from easyeditor.core.prompts import Fact, fact_row, facts_of
from easyeditor.core.rows import batch_of
from easyeditor.core.suffix import Place, Recorded, record, run_full, short_way
from easyeditor.errors import NonFinite, UsageError
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import fused_activations
from easyeditor.lm.model import LM
from easyeditor.requests import EditRequest

GROUP = 2048  # tokens from the subjects on, per batch at most, so that it stays in memory
ENOUGH = 512  # tokens that fill the processor: from here on, a longer fact begins a batch rather than lengthen all
FEWER = 0.75  # a batch is made smaller when no more than this share of it is still moving
STEEPEST = 1e6  # a larger step leaves the range in which squares can be computed


@dataclass(frozen=True)
class ValueSettings:
    """How values are optimised.

    Args:
        steps: Forward passes.
        lr: Adam's step size.
        weight_decay: Factor of the decay.
        clamp: The largest ``|d| / |v|``.
        kl_factor: Factor of the divergence on ``{subject} is a``.
        stop_loss: A loss below which the value is found.
        place: ``mlp``: the output of the MLP's projection; ``block``: the residual stream after the block;
            ``attn+mlp``: both projections at once, each with its own vector.
        suffix_only: Whether to recompute only what changes; the result is the same.
        nll_factor: Factor of the first term.
        prob_cutoff: ENCORE. -n: a value is found n steps after its answer leads in all contexts; a positive number:
            when the mean probability of the answer is above it.
        decay: The decay term.
        extra: A further term; its factors are its own.
        watch: Modules whose outputs at the subject the further term sees.
        start: Where facts begin, from what stood there, both (facts, kinds, width); None: at zero.
        largest: The largest ``|d|`` of each fact, (facts,), instead of the clamp.

    Raises:
        UsageError: The step size is none.
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl_factor: float
    stop_loss: float = 5e-2
    place: str = "mlp"
    suffix_only: bool = True
    nll_factor: float = 1.0
    prob_cutoff: float | None = None
    decay: Callable[[Step], Tensor] = decay
    extra: Callable[[Step], Tensor] | None = None
    watch: tuple[nn.Module, ...] = ()
    start: Callable[[Tensor, Tensor], Tensor] | None = None
    largest: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < STEEPEST:
            raise UsageError(
                f"Setting 'v_lr' is {self.lr:g}. It has to be a number above 0 and below {STEEPEST:g}; the papers take "
                "0.1 to 0.5."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The places, one by one."""
        return tuple(self.place.split("+"))


@dataclass(frozen=True)
class Value:
    """An optimised value.

    Args:
        deltas: d at each place, (kinds, width), fp32.
        befores: v, what stood there in the bare prompt, (kinds, width), fp32.
        losses: The loss of each step.
    """

    deltas: Tensor
    befores: Tensor
    losses: list[float] = field(default_factory=list)

    @property
    def delta(self) -> Tensor:
        """D at the first place, (width,)."""
        return self.deltas[0]

    @property
    def before(self) -> Tensor:
        """V at the first place, (width,)."""
        return self.befores[0]


def values(
    lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Sequence[str], settings: ValueSettings
) -> list[Value]:
    """Optimise the values of requests, each for itself.

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
        NonFinite: The optimisation diverges.
    """
    return optimise(lm, facts_of(requests, contexts), layer, settings)


@spent("values")
def optimise(lm: LM, facts: Sequence[Fact], layer: int, settings: ValueSettings) -> list[Value]:
    """Optimise the values of facts in batches of similar length; see `values`.

    A further term that compares facts sees the final values of earlier batches; facts keep their order for it.
    """
    place = Place(layer, settings.kinds)
    found = torch.zeros(len(facts), len(settings.kinds), lm.width, device=lm.device)
    out: dict[int, Value] = {}
    with lm.frozen(), fused_activations(lm.model):
        for group in groups(lm, facts, in_order=settings.extra is not None):
            out |= dict(
                zip(group, _Group(lm, [facts[i] for i in group], group, place, settings, found).solve(), strict=True)
            )
    return [out[i] for i in range(len(facts))]


def groups(lm: LM, facts: Sequence[Fact], in_order: bool = False) -> Iterator[list[int]]:
    """The batches: facts, by number, whose rows are about equally long, as many as the budget allows.

    Args:
        lm: The model.
        facts: The facts.
        in_order: Whether facts keep their order; else they are sorted by length.
    """
    sizes = []
    for fact in facts:
        rows = [fact_row(lm, request, text, request.target_new) for request in fact.requests for text in fact.contexts]
        sizes.append((max(len(r.ids) - r.subject for r in rows), max(r.subject for r in rows), len(rows) + 1))
    order = range(len(facts)) if in_order else sorted(range(len(facts)), key=lambda i: sizes[i][:2])
    group: list[int] = []
    rows_in, longest = 0, 0
    for i in order:
        suffix, _, count = sizes[i]
        full = (rows_in + count) * max(longest, suffix) > GROUP or (suffix > longest and rows_in * longest >= ENOUGH)
        if group and full:
            yield group
            group, rows_in, longest = [], 0, 0
        group.append(i)
        rows_in, longest = rows_in + count, max(longest, suffix)
    if group:
        yield group


class _Group:
    """One batch of facts on its way to their values."""

    def __init__(
        self, lm: LM, facts: Sequence[Fact], index: list[int], place: Place, settings: ValueSettings, found: Tensor
    ) -> None:
        self.lm, self.place, self.settings, self.found = lm, place, settings, found
        self.batch = batch_of(lm, facts)
        self.index = torch.tensor(index, device=lm.device)
        recorded = record(lm, self.batch, place, with_cache=settings.suffix_only)
        self.suffix = short_way(lm, self.batch, place, recorded) if settings.suffix_only else None
        if self.suffix is not None:
            self.suffix.watch = settings.watch
        self.befores = self._befores(recorded)
        self.size = self.befores.norm(dim=2)  # (facts, kinds)
        self.essence = log_probs(recorded.logits[len(self.batch.labels) :])
        self.led = torch.zeros(self.batch.count, dtype=torch.long, device=lm.device)

    def _befores(self, recorded: Recorded) -> Tensor:
        """What stands at the places in the bare prompts, (facts, kinds, width); the mean over merged requests."""
        bare = recorded.states[self.batch.bare.to(recorded.states.device)]
        owner = self.batch.bare_owner.to(bare.device)
        total = torch.zeros(self.batch.count, *bare.shape[1:], device=bare.device).index_add(0, owner, bare)
        return total / torch.bincount(owner, minlength=self.batch.count)[:, None, None]

    def solve(self) -> list[Value]:
        settings, count = self.settings, self.batch.count
        delta = torch.zeros_like(self.befores)
        if settings.start is not None:
            delta.copy_(settings.start(self.index, self.befores))
            self.found[self.index] = delta
        problems = Problems(delta, settings.lr)
        traces: list[list[float]] = [[] for _ in range(count)]
        alive = torch.arange(count, device=delta.device)  # which of the group's facts are in the batch
        final = torch.empty_like(delta)
        befores = self.befores
        for step in range(settings.steps):
            with torch.enable_grad():
                loss, done = self._losses(problems.current)
            self._check_finite(loss)
            for i, value in zip(alive[problems.moving].tolist(), loss[problems.moving].tolist(), strict=True):
                traces[i].append(value)
            problems.stop(done)
            if step == settings.steps - 1 or not problems.moving.any():
                break
            problems.step(loss)
            self._clamp(problems.current)
            self.found[self.index] = problems.current.detach()
            if problems.moving.float().mean() <= FEWER:
                moving = problems.moving.clone()
                final[alive[~moving]] = problems.current.detach()[~moving]
                alive = alive[moving]
                self._keep(moving)
                problems.keep(moving)
        final[alive] = problems.current.detach()
        return [Value(final[i], befores[i], traces[i]) for i in range(count)]

    def _losses(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each fact, and which facts are found."""
        s = self.settings
        if self.suffix is not None:
            passed = self.suffix(self.batch, delta)
        else:
            passed = run_full(self.lm, self.batch, self.place, delta, s.watch)
        step = Step(self.batch, delta, self.size, passed, self.essence, self.index, self.found)
        first = nll(step)
        loss = s.nll_factor * first + s.kl_factor * kl(step) + s.weight_decay * s.decay(step).to(first.device)
        if s.extra is not None:
            loss = loss + s.extra(step).to(loss.device)
        done = loss.detach() < s.stop_loss
        if s.prob_cutoff is not None and s.prob_cutoff < 0:
            self.led += leads(step).to(self.led.device)
            done |= (self.led >= -s.prob_cutoff).to(done.device)
        elif s.prob_cutoff is not None:
            done |= (probability(step) > s.prob_cutoff).to(done.device)
        return loss, done

    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise NonFinite(
                "The value optimisation diverges: its loss is no finite number. The model is as before. "
                "Lower v_lr or clamp_norm_factor, or load the model in bfloat16 or float32."
            )

    @torch.no_grad()
    def _clamp(self, delta: Tensor) -> None:
        largest = self.settings.clamp * self.size
        if self.settings.largest is not None:
            largest = self.settings.largest.to(delta)[self.index][:, None].expand_as(self.size)
        delta.mul_((largest / delta.norm(dim=2).clamp(min=1e-12)).clamp(max=1.0)[:, :, None])

    def _keep(self, facts: Tensor) -> None:
        """Go on with some of the facts."""
        self.batch, rows = self.batch.take(facts)
        if self.suffix is not None:
            self.suffix.keep(rows)
        self.index, self.size, self.essence = self.index[facts], self.size[facts], self.essence[facts]
        self.befores, self.led = self.befores[facts], self.led[facts]
