"""States that make a model say long answers. UnKE, arXiv:2405.15349.

    min over d of  mean of -log p(answer) with h + d for h  +  v_weight_decay |d| / |h|^2,   |d| <= clamp |h|

h is what a block returns at the token that the answer follows. An answer may be cut into windows, each with a vector
of its own at the token in front of it, found one after another (AnyEdit, arXiv:2502.05628). Blocks below are computed
once per window, and a window is not run beyond its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyeditor.core.learn import descend
from easyeditor.core.likelihood import Answers, answers
from easyeditor.errors import NonFinite
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import replace, stop_after
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.resume import Cut, cut_at, head_at, resumed

FOUND = 1e-2  # the loss at which a vector is not moved any more
GROUP = 8192  # tokens of answers that are worked on at a time, so that they stay in memory

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class VectorSettings:
    """How vectors are found.

    Args:
        steps: Forward passes per window.
        lr: Adam's step size.
        weight_decay: Factor of ``|d| / |h|^2``.
        clamp: The largest ``|d| / |h|``.
        window: The tokens of a window; None: the whole answer is one.
        overlap: How many of them the next window has as well.
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    window: int | None = None
    overlap: int = 0


@dataclass(frozen=True)
class Wanted:
    """Answers and the vectors that bring them about.

    Args:
        batch: The answers.
        rows: Of each vector, (vectors,).
        columns: The token that it stands at, (vectors,).
        vectors: D, (vectors, width), fp32.
        losses: The last loss of each.
    """

    batch: Answers
    rows: Tensor
    columns: Tensor
    vectors: Tensor
    losses: list[float]


@spent("values")
def wanted(lm: LM, pairs: Pairs, layer: int, settings: VectorSettings) -> list[Wanted]:
    """Find the vectors of answers, in groups that stay in memory.

    Args:
        lm: The model; it is left as it was.
        pairs: Prompts, as the model is asked, and answers.
        layer: The block whose output they are added to.
        settings: How.

    Raises:
        NonFinite: The optimisation diverges.
    """
    found: list[Wanted] = []
    for group in _groups(lm, pairs):
        batch = answers(lm, group)
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        losses: list[float] = []
        vectors = torch.zeros(0, lm.width, device=lm.device)
        for tokens in _windows(batch, settings):
            inside = tokens.nonzero().squeeze(1)
            starts = torch.ones_like(inside, dtype=torch.bool)
            starts[1:] = batch.rows[inside[1:]] != batch.rows[inside[:-1]]
            keys = inside[starts]  # the first token of each row's window
            rows.append(batch.rows[keys])
            columns.append(batch.columns[keys])
            search = _Search(lm, batch, tokens, layer, torch.cat(rows), torch.cat(columns), vectors, settings)
            more, loss = search.solve()
            vectors, losses = torch.cat([vectors, more]), losses + loss
        found.append(Wanted(batch, torch.cat(rows), torch.cat(columns), vectors, losses))
    return found


def _groups(lm: LM, pairs: Pairs) -> Iterator[Pairs]:
    group: list[tuple[str, str]] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, len(lm.text.encode_pair(*pair)[0].ids))
        if group and longest * (len(group) + 1) > GROUP:
            yield group
            group, longest = [], len(lm.text.encode_pair(*pair)[0].ids)
        group.append(pair)
    yield group


def _windows(batch: Answers, settings: VectorSettings) -> Iterator[Tensor]:
    """Which answer tokens are in the first window of each row, in the second, and so on; each (tokens,), bool."""
    starts = torch.stack([(batch.rows == row).nonzero()[0, 0] for row in range(len(batch.ids))])
    place = torch.arange(len(batch.rows), device=batch.rows.device) - starts[batch.rows]  # in its answer
    length = settings.window or int(place.max()) + 1
    for start in range(0, int(place.max()) + 1, length - settings.overlap):
        tokens = (place >= start) & (place < start + length)
        if start and not (place >= start + settings.overlap).any():
            return  # nothing that an earlier window did not have
        yield tokens


class _Search:
    """The vectors of one window of each answer; those of earlier windows stay as they are."""

    def __init__(
        self,
        lm: LM,
        batch: Answers,
        tokens: Tensor,
        layer: int,
        rows: Tensor,
        columns: Tensor,
        before: Tensor,
        settings: VectorSettings,
    ) -> None:
        end = int(batch.columns[tokens].max()) + 1
        decoder_ids = batch.decoder_ids[:, :end] if batch.decoder_ids is not None else None
        ids, mask = (batch.ids, batch.mask) if lm.seq2seq else (batch.ids[:, :end], batch.mask[:, :end])
        self.lm, self.layer, self.settings, self.before = lm, layer, settings, before
        self.batch = Answers(ids, mask, decoder_ids, batch.rows[tokens], batch.columns[tokens], batch.labels[tokens])
        self.rows, self.columns = rows, columns
        self.owner = {int(row): i for i, row in enumerate(rows[len(before) :])}
        self.cut = self._below()
        self.size = self.cut.states[rows[len(before) :], columns[len(before) :]].float().norm(dim=1)  # (problems,)

    def _below(self) -> Cut:
        block = self.lm.blocks[self.layer]
        with torch.no_grad(), cut_at(self.lm, self.layer + 1) as cut, stop_after(block):
            self.lm.run(self.batch.ids, self.batch.mask, decoder_input_ids=self.batch.decoder_ids)
        return cut

    def solve(self) -> tuple[Tensor, list[float]]:
        vectors = torch.zeros(len(self.owner), self.lm.width, device=self.lm.device)
        s = self.settings
        largest = s.clamp * self.size

        def clamp() -> None:
            vectors.mul_((largest / vectors.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None])

        trace = descend(
            [vectors], lambda: self._losses(vectors), steps=s.steps, lr=s.lr, stop_below=FOUND, project=clamp
        )
        return vectors.detach(), trace[-1]

    def _losses(self, vectors: Tensor) -> Tensor:
        with self._with(torch.cat([self.before, vectors])), head_at(self.lm, self.batch.rows, self.batch.columns) as at:
            out = self.lm.run(self.batch.ids, self.batch.mask, decoder_input_ids=self.batch.decoder_ids)
        logits = at.logits(logits_of(out)).float()
        each = nn.functional.cross_entropy(logits, self.batch.labels.to(logits.device), reduction="none")
        owner = torch.tensor([self.owner[int(row)] for row in self.batch.rows], device=each.device)
        count = torch.bincount(owner, minlength=len(vectors))
        loss: Tensor = torch.zeros(len(vectors), device=each.device).index_add(0, owner, each) / count
        loss = loss + self.settings.weight_decay * vectors.norm(dim=1).to(loss) / self.size.to(loss) ** 2
        if not torch.isfinite(loss).all():
            raise NonFinite(
                "The search for the states of an answer diverges: its loss is no finite number. The model is as "
                "before. Lower v_lr or clamp_norm_factor, or load the model in bfloat16 or float32."
            )
        return loss

    @contextmanager
    def _with(self, vectors: Tensor) -> Iterator[None]:
        """A context in which vectors are added to what the block returns."""

        def add(states: Tensor) -> Tensor:
            return added(states, self.rows, self.columns, vectors)

        with ExitStack() as stack:
            if self.lm.seq2seq:
                stack.enter_context(replace(self.lm.blocks[self.layer], add))
            else:
                stack.enter_context(resumed(self.lm, self.cut, add(self.cut.states)))
            yield


def added(states: Tensor, rows: Tensor, columns: Tensor, vectors: Tensor) -> Tensor:
    """States (rows, length, width) with vectors added at some places."""
    at = rows.to(states.device), columns.to(states.device)
    found: Tensor = states.index_put(at, vectors.to(states), accumulate=True)
    return found
