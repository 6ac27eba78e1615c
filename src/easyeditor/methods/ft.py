"""FT: constrained fine-tuning of a few MLP projections. Zhu et al., 2020. arXiv:2012.00363; FT-L and FT-M.

Idea      Train the output projection of some blocks until the new answer is likely; no weight goes far from its base.
Equation  min over D of the cross-entropy of the new answer under W + D,  |D|_inf <= norm_constraint.
          FT-M (`target_new`): the shifted cross-entropy over all tokens of the answer, teacher-forced.
          FT-L (`prompt_last`): the mean of -log p(t) over the answer's tokens t, all read at the prompt's last token,
          as in the baseline of the ROME paper; it is wrong for answers of several tokens and kept for comparison.
Changes   One projection per block in `layers`, densely.
Needs     Nothing but prompt and answer.
Relations LocFT-BF is FT-M in mini-batches with more epochs.
Deviates  The weight is not changed while training: D is a tensor of its own in fp32, whatever the model's dtype.
          Blocks below the lowest edited one are computed once. EasyEdit ends an epoch loop the same way: a batch below
          a loss of 1e-2 is skipped, and the training ends when the mean is below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.learn import descend
from easyeditor.core.likelihood import Answers, answers, mean_per_row, token_log_probs
from easyeditor.edits.delta import Dense
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates
from easyeditor.lm.hooks import stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.resume import Cut, cut_at, resumed, with_weight
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

SOLVED = 1e-2


@dataclass(kw_only=True)
class FTHyperParams(ModuleTemplates, HyperParams):
    """Settings of FT."""

    alg_name: str = "FT"
    layers: list[int] = field(default_factory=list)  # the blocks to train; empty: preset row, else by depth
    num_steps: int = 25  # epochs over the requests
    lr: float = 5e-4  # Adam's step size
    weight_decay: float = 0.0  # Adam's L2 factor, on the weights
    kl_factor: float = 0.0  # kept for existing files; the original does not use it either
    norm_constraint: float | bool = False  # the largest change of any weight; false: no bound
    objective_optimization: str = "target_new"  # 'target_new' (FT-M) or 'prompt_last' (FT-L)
    batch_size: int = 64  # requests per step

    def check(self) -> None:
        """An objective, a bound and sizes that mean something."""
        if self.objective_optimization not in ("target_new", "prompt_last"):
            raise UsageError(
                f"Setting 'objective_optimization' of FT is '{self.objective_optimization}'. "
                "Choose 'target_new' (FT-M) or 'prompt_last' (FT-L)."
            )
        if self.norm_constraint is True:
            raise UsageError("Setting 'norm_constraint' of FT is true. Give the largest change of a weight, or false.")
        if self.batch_size < 1 or self.num_steps < 1:
            raise UsageError("Settings 'batch_size' and 'num_steps' of FT are numbers from 1 on. Correct them.")
        if len(set(self.layers)) != len(self.layers):
            raise UsageError(f"Setting 'layers' of FT names a block twice: {self.layers}. Name each once.")


@method("FT", hparams=FTHyperParams, paper="arXiv:2012.00363", requests="many")
def ft(
    lm: LM, requests: Sequence[EditRequest], hparams: FTHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The dense edit of any number of facts."""
    sites = [lm.mlp_out(layer) for layer in sorted(hparams.layers)]
    deltas = [torch.zeros(site.d_out, site.d_in, device=site.weight.device) for site in sites]
    with lm.frozen(), _weights(sites, deltas):
        batches = [_Batch(lm, part, min(hparams.layers), hparams) for part in _parts(requests, hparams.batch_size)]
        trace = _train(batches, sites, deltas, hparams)
    return WeightEdit(
        deltas={site.weight_name: Dense(delta) for site, delta in zip(sites, deltas, strict=True)},
        notes={"losses": trace},
    )


def loss(lm: LM, batch: Answers) -> Tensor:
    """The mean over the requests of the mean over the answer's tokens of -log p, a scalar."""
    return -mean_per_row(token_log_probs(lm, batch), batch).mean()


class _Batch:
    """Some requests, with what passes below the lowest edited block already computed."""

    def __init__(self, lm: LM, requests: Sequence[EditRequest], first: int, hparams: FTHyperParams) -> None:
        self.lm = lm
        pairs = [(lm.text.render(request.prompt), request.target_new) for request in requests]
        self.answers = answers(lm, pairs, at_prompt_end=hparams.objective_optimization == "prompt_last")
        self.cut = Cut(0) if lm.seq2seq else self._below(first)

    def _below(self, first: int) -> Cut:
        if first == 0:
            return Cut(0)
        with torch.no_grad(), cut_at(self.lm, first) as cut, stop_after(self.lm.blocks[first - 1]):
            self.lm.run(self.answers.ids, self.answers.mask)
        return cut

    def loss(self) -> Tensor:
        with resumed(self.lm, self.cut, self.cut.states) if self.cut.first else ExitStack():
            return loss(self.lm, self.answers)


def _train(
    batches: Sequence[_Batch], sites: Sequence[Site], deltas: list[Tensor], hparams: FTHyperParams
) -> list[float]:
    """Adam over the batches, epoch by epoch, until the mean loss of an epoch is small."""
    bound = float(hparams.norm_constraint)
    epochs = _Epochs(batches)

    def losses() -> Tensor:
        decay = [(site.matrix() + delta).square().sum() for site, delta in zip(sites, deltas, strict=True)]
        return epochs.loss() + (hparams.weight_decay / 2 * torch.stack(decay).sum() if hparams.weight_decay else 0.0)

    def project() -> None:
        for delta in deltas if bound else ():
            delta.clamp_(-bound, bound)

    descend(
        deltas,
        losses,
        steps=hparams.num_steps * len(batches),
        lr=hparams.lr,
        stop_below=SOLVED,
        project=project,
        done=epochs.done,
        final_update=True,
    )
    return epochs.means


class _Epochs:
    """Which batch comes next, and when it is enough."""

    def __init__(self, batches: Sequence[_Batch]) -> None:
        self.batches = batches
        self.losses: list[float] = []
        self.means: list[float] = []

    def loss(self) -> Tensor:
        value = self.batches[len(self.losses) % len(self.batches)].loss()
        self.losses.append(float(value.detach()))
        return value[None]

    def done(self) -> bool:
        if len(self.losses) % len(self.batches) == 0:
            self.means.append(sum(self.losses[-len(self.batches) :]) / len(self.batches))
            return self.means[-1] < SOLVED
        return False


@contextmanager
def _weights(sites: Sequence[Site], deltas: Sequence[Tensor]) -> Iterator[None]:
    """A context in which each site computes with W + D."""
    with ExitStack() as stack:
        for site, delta in zip(sites, deltas, strict=True):
            stack.enter_context(with_weight(site.module, _sum(site.matrix(), delta)))
        yield


def _sum(weight: Tensor, delta: Tensor) -> Callable[[], Tensor]:
    return lambda: weight + delta


def _parts(requests: Sequence[EditRequest], size: int) -> list[Sequence[EditRequest]]:
    return [requests[i : i + size] for i in range(0, len(requests), max(size, 1))]
