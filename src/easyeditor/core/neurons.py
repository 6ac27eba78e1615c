"""Which feed-forward neurons carry a fact: integrated gradients of the answer's probability. arXiv:2104.08696.

A neuron is an input of an MLP's output projection, at the token that predicts the answer. With w the values of a
block's neurons there and P(x) the probability of the answer when they are x,

    attribution_i = w_i / m * sum over k = 1 ... m of dP/dx_i at x = k/m w,

of all neurons of a block at once; with many steps m they add up to P(w) - P(0). An answer of several tokens has the
mean over its tokens. All steps are rows of one batch, and blocks below the one that is looked at are not computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.core.likelihood import Answers, answers
from easyeditor.errors import UsageError
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import by_row, capture
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.resume import Cut, cut_at, head_at, resumed

log = logging.getLogger(__name__)

CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # how a model says that it lacks a way

Watch = Callable[[Sequence[int]], Iterable[int]]
Chosen = tuple[Tensor, ...]  # for each block which of its neurons, (d_in,), bool


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the neurons of each block do for an answer.

    Args:
        scores: Of each block, (d_in,), fp64.
        values: The neurons' values w, the mean over the answer's tokens; of each block, (d_in,), fp64.
        probability: That of the answer's tokens, their mean.
    """

    scores: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    probability: float


@spent("gradients")
def attribution(
    lm: LM, prompt: str, answer: str, steps: int = 20, *, batch_tokens: int = 4096, watch: Watch = iter
) -> Attribution:
    """Attribute the probability of an answer to the neurons of each block (Knowledge Neurons, equations 2 and 3).

    Args:
        lm: The model, with whatever edits are on it; it is left as it was.
        prompt: As the model is asked it.
        answer: The answer.
        steps: m; the paper and its authors take 20.
        batch_tokens: Tokens per forward pass; the result does not depend on it.
        watch: Goes through the blocks, to show progress.

    Returns:
        Scores and values; of the decoder's blocks, for an encoder-decoder model.

    Raises:
        UsageError: There are no steps.
    """
    if steps < 1:
        raise UsageError(f"The number of integration steps is {steps}. Choose at least 1; the paper takes 20.")
    with lm.frozen():
        path = _Path(lm, answers(lm, [(prompt, answer)]), batch_tokens)
        scores = [path.scores(layer, steps) for layer in watch(range(len(lm.blocks)))]
    return Attribution(tuple(scores), tuple(w.double().mean(0).cpu() for w in path.values), float(path.p.mean()))


def coarse(scores: Sequence[Tensor], threshold: float) -> Chosen:
    """The neurons whose score is above a share of the largest of all blocks (section 3.2)."""
    bound = threshold * max(float(each.max()) for each in scores)
    return tuple((each > bound) & (each > 0) for each in scores)


def refined(found: Sequence[Chosen], share: float) -> Chosen:
    """The neurons that at least a share of the prompts have in common (section 3.2)."""
    return tuple(torch.stack(blocks).double().mean(0) >= share for blocks in zip(*found, strict=True))


class _Path:
    """The runs of one prompt with its answer, in which the neurons of one block are scaled.

    Args:
        lm: The model.
        batch: The prompt with its answer, one row.
        batch_tokens: Tokens per forward pass.

    Attributes:
        values: Of each block the neurons at the answer's tokens, (tokens, d_in), fp32.
        p: The probability of each token, (tokens,), fp64.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, batch: Answers, batch_tokens: int) -> None:
        self.lm, self.batch = lm, batch
        self.at_once = max(batch_tokens // batch.ids.shape[1], 1)
        self.modules = [lm.mlp_out(layer).module for layer in range(len(lm.blocks))]
        self.encoded = self._encoded()
        tokens = len(batch.labels)
        with ExitStack() as stack:
            seen = [stack.enter_context(capture(module, "input")) for module in self.modules]
            depth = range(1 if lm.seq2seq else len(lm.blocks))
            self.cuts = [stack.enter_context(cut_at(lm, first)) for first in depth]
            self.p = self._probabilities(torch.zeros(tokens, dtype=torch.long), torch.arange(tokens)).double().cpu()
        self.values = [by_row(x[0], 1, lm.sequence_first)[0, batch.columns.to(x[0].device)].float() for x in seen]

    def scores(self, layer: int, steps: int) -> Tensor:
        """The attributions of one block, (d_in,), fp64."""
        w = self.values[layer]  # (tokens, d_in)
        if layer and not self.lm.seq2seq:
            try:
                slopes, end = self._slopes(layer, steps, self.cuts[layer])
                bound = 1e-4 if self.lm.dtype == torch.float32 else 3e-2
                if (end - self.p).abs().max() <= bound:
                    return (w.double() * slopes).mean(0).cpu()
            except CANNOT as error:
                log.debug("%s cannot be resumed at block %d: %s", self.lm.name, layer, error)
        return (w.double() * self._slopes(layer, steps, Cut(0))[0]).mean(0).cpu()

    def _slopes(self, layer: int, steps: int, cut: Cut) -> tuple[Tensor, Tensor]:
        """The mean gradient along the path, (tokens, d_in), fp64; and P at its end, (tokens,), fp64."""
        w = self.values[layer]
        share = (torch.arange(1, steps + 1, device=w.device) / steps).repeat_interleave(len(w))  # (steps * tokens,)
        token = torch.arange(len(w), device=w.device).repeat(steps)
        total, end = torch.zeros(w.shape, dtype=torch.float64, device=w.device), self.p
        for start in range(0, len(share), self.at_once):
            which = token[start : start + self.at_once]
            x = (share[start : start + self.at_once, None] * w[which]).requires_grad_(True)
            with torch.enable_grad(), self._scaled(layer, x, which), self._from(cut, len(which)):
                p = self._probabilities(torch.arange(len(which)), which)
            (slope,) = torch.autograd.grad(p.sum(), [x])
            total.index_add_(0, which, slope.double())
            last = share[start : start + self.at_once].cpu() == 1
            end = end.index_put((which.cpu()[last],), p.detach().double().cpu()[last])
        return total / steps, end

    def _probabilities(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """P of some answer tokens, each read in a row of its own or all in one, (tokens,)."""
        lm, batch, count = self.lm, self.batch, int(rows.max()) + 1
        tokens = tokens.to(batch.labels.device)
        with head_at(lm, rows, batch.columns[tokens]) as at:
            out = lm.run(
                batch.ids.expand(count, -1).contiguous(),
                batch.mask.expand(count, -1).contiguous(),
                decoder_input_ids=None if batch.decoder_ids is None else batch.decoder_ids.expand(count, -1),
                encoder_outputs=self._encoder_rows(count),
            )
        logp = at.logits(logits_of(out)).float().log_softmax(-1)
        return logp.gather(1, batch.labels[tokens][:, None].to(logp.device)).squeeze(1).exp()

    def _encoded(self) -> Any:
        """What an encoder says of the prompt, which no neuron of the decoder changes."""
        if not self.lm.seq2seq:
            return None
        return self.lm.model.get_encoder()(input_ids=self.batch.ids, attention_mask=self.batch.mask)  # type: ignore[operator]

    def _encoder_rows(self, rows: int) -> Any:
        if self.encoded is None:
            return None
        return type(self.encoded)(last_hidden_state=self.encoded.last_hidden_state.expand(rows, -1, -1))

    @contextmanager
    def _from(self, cut: Cut, rows: int) -> Iterator[None]:
        """A context in which the pass begins at a cut."""
        if not cut.first:
            yield
            return
        with resumed(self.lm, cut, cut.states.expand(rows, -1, -1)):
            yield

    @contextmanager
    def _scaled(self, layer: int, x: Tensor, which: Tensor) -> Iterator[None]:
        """A context in which the neurons of a block are x, (rows, d_in), at the token that each row looks at."""
        first = self.lm.sequence_first

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            taken = by_row(args[0], len(which), first).clone()
            rows = torch.arange(len(which), device=taken.device)
            taken[rows, self.batch.columns[which.to(self.batch.columns.device)].to(taken.device)] = x.to(taken)
            return ((taken.transpose(0, 1) if first else taken).reshape(args[0].shape), *args[1:])

        handle = self.modules[layer].register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()
