"""RLEdit: Reinforced Lifelong Editing for Language Models. Li et al., ICML 2025. arXiv:2502.05759.

Idea      MALMEN's network goes wrong once earlier edits have moved the weights. It is trained over whole sequences of
          edits, each made on the model as the last one left it: the weights are the state, a change is the action, and
          the reward of a step says how well the last few edits hold after it.
Equation  W_t = W_(t-1) + Delta_t, with MALMEN's Delta_t from the tokens on W_(t-1);
          minimised: sum over t of  sum over i < back_depth of time_decay^i L(edit t - i | W_t) + reg_coef |Delta_t|^2,
          L = -log p(new answer) + loc_coef KL(before || after)(probes)
Changes   Each projection of `inner_params`, as MALMEN; one edit after another, or some in a batch.
Needs     Prompt and answer, and an archive that `easyedit train` wrote for this model.
Relations With num_seq = 1 and reg_coef = 0 it is MALMEN.
Deviates  What must not move is compared with the model before all edits, not with the one before the step, so that
          drift does not add up. Losses are means over facts and steps. As with the authors, a step is rewarded for its
          own change; gradients do not flow through the tokens of later steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.massive import carried, changed
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.methods.malmen import Malmen, MALMENTraining, malmen, prepare
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class _RLEdit(Malmen):
    """What the network looks like and what it learns; the archive holds to it afterwards."""

    alg_name: str = "RLEdit"
    rank: int = 1024  # of the blocks, at most their width
    n_blocks: int = 4  # of the network
    loc_coef: float = 0.6  # weight of the divergence on what must not move
    reg_coef: float = 1e-4  # weight of a change's squared size
    time_decay: float = 0.95  # what an edit weighs in the reward of the next one, of what it weighs in its own
    back_depth: int = 10  # edits that a reward looks back on, its own included
    num_seq: int = 20  # edits of a sequence in training
    n_edits: int = 20  # facts per edit in training
    batch_size: int = 20  # facts per edit
    val_batch_size: int = 400  # facts of a sequence in validation

    def check(self) -> None:
        """Sizes that mean something."""
        super().check()
        if self.back_depth < 1 or self.num_seq < 1:
            raise UsageError(
                f"Settings 'back_depth' and 'num_seq' of {self.alg_name} are {self.back_depth} and {self.num_seq}. "
                "Both begin at 1."
            )
        if not 0 < self.time_decay <= 1 or not 0 <= self.reg_coef < math.inf:
            raise UsageError(
                f"Settings 'time_decay' and 'reg_coef' of {self.alg_name} are {self.time_decay} and {self.reg_coef}. "
                "The first is above 0 and at most 1, the second begins at 0."
            )

    @property
    def per_batch(self) -> int:
        """Facts of one sequence of the training."""
        return self.n_edits * self.num_seq


@dataclass(kw_only=True)
class RLEditTrainingHparams(_RLEdit):
    """Settings of the training of RLEdit."""

    alg: str = "RLEdit"  # alg_name under its other name

    def editor(self, lm: LM) -> Trainable:
        """What is trained, on a model."""
        return RLEditTraining(lm, self)


@dataclass(kw_only=True)
class RLEditHyperParams(_RLEdit):
    """Settings of RLEdit."""

    training: ClassVar[type[Trained]] = RLEditTrainingHparams


class RLEditTraining(MALMENTraining):
    """RLEdit as the trainer sees it: a batch is a sequence of edits."""

    hparams: _RLEdit

    def _batch(self, group: Sequence[Visit]) -> dict[str, Tensor]:
        """The losses of one sequence: the total over its steps, all else after the last one."""
        size = self.hparams.n_edits
        steps = [group[start : start + size] for start in range(0, len(group), size)]
        weights = dict(self.module.named_parameters())
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        so_far = {site.weight_name: torch.zeros_like(site.matrix()) for site in self.sites}
        means: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.double)
        for t, step in enumerate(steps):
            changes = self._changes(step, so_far)
            so_far = {name: so_far[name] + change.detach().float() for name, change in changes.items()}
            recent = list(reversed(steps[max(t + 1 - self.hparams.back_depth, 0) : t + 1]))
            reward, by_change, means = self._reward(recent, group[: (t + 1) * size], so_far)
            size_of = torch.stack([change.square().sum() for change in changes.values()]).sum()
            loss = reward + self.hparams.reg_coef * size_of + carried(changes, by_change)
            total += loss.detach().cpu() / len(steps)
            if loss.requires_grad:  # at once, so that what a step holds is gone before the next
                parts = torch.autograd.grad(loss / len(steps), list(weights.values()), allow_unused=True)
                for name, part in zip(weights, parts, strict=True):
                    gradients[name] += 0.0 if part is None else part
        found = total.float() + carried(weights, gradients)
        return {**means, "loss/total_edit": found.detach(), TOTAL: found}

    def _changes(self, step: Sequence[Visit], so_far: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network makes of some facts on the model with earlier changes."""
        with changed(self.sites, so_far):
            tokens = self.tokens(step)
        return {name: self.module.change(name, tokens[name], self.hparams.editor_batch_size) for name in tokens}

    def _reward(
        self, recent: Sequence[Sequence[Visit]], edited: Sequence[Visit], after: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The decayed losses of the last edits, the newest first; their gradient by the change; plain means."""
        found = [self.lessons(self._asked(visits), edited, after) for visits in recent]
        weights = [self.hparams.time_decay**i for i in range(len(found))]
        reward = sum((w * means[TOTAL] for w, (means, _) in zip(weights, found, strict=True)), torch.zeros(()))
        gradients = {
            name: sum((w * each[name] for w, (_, each) in zip(weights, found, strict=True)), torch.zeros(()))
            for name in after
        }
        means = {name: torch.stack([each[name] for each, _ in found]).mean() for name in found[0][0]}
        return reward, gradients, means


@method("RLEdit", hparams=RLEditHyperParams, paper="arXiv:2502.05759", requests="many", prepare=prepare)
def rledit(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: RLEditHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests, on the model as it is."""
    return malmen(lm, requests, hparams, state, history)
