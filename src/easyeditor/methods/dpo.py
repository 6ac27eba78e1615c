"""DPO: Direct Preference Optimization. Rafailov et al., NeurIPS 2023. arXiv:2305.18290; as an edit, on adapters.

Idea      Low-rank adapters learn to prefer the new answer to one that is to be given no longer.
Equation  alpha CE(y+) + (1 - alpha) (-log sigmoid(beta ((log p(y+) - log p0(y+)) - (log p(y-) - log p0(y-)))))
          y+ is `target_new`, y- is `target_neg`, p0 the model as it is before; log p sums over an answer's tokens,
          CE is their mean.
Changes   Every adapted weight, with the rank of its adapter.
Needs     `target_neg`; peft, which is in the extra `train`.
Relations With alpha = 1 it is LoRA without the early end.
Deviates  The reference log-probabilities are computed once, and both answers are read in one pass. There is no early
          end: a preference is never reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from easyeditor.core.adapters import low_rank_edit, targets
from easyeditor.core.learn import Minibatch
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.adapters import AdapterSettings
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class DPOHyperParams(AdapterSettings):
    """Settings of DPO."""

    alg_name: str = "DPO"
    alpha: float = 0.1  # the share of the cross-entropy of the new answer in the loss
    beta: float = 0.1  # how strongly a preference counts

    def check(self) -> None:
        """A share and a strength."""
        super().check()
        if not 0 <= self.alpha <= 1 or self.beta <= 0:
            raise UsageError(
                f"Settings of DPO: alpha is {self.alpha}, expected a share from 0 to 1; beta is {self.beta}, "
                "expected a number above 0. Correct them."
            )


@method("DPO", hparams=DPOHyperParams, paper="arXiv:2305.18290", requests="many", needs=("target_neg",))
def dpo(
    lm: LM, requests: Sequence[EditRequest], hparams: DPOHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The low-rank edit of any number of preferences."""
    for request in requests:
        request.require(("target_neg",), "DPO")
    sites = targets(lm, hparams.target_modules, hparams.layers)
    first, size = min(lm.block_of(site) for site in sites), hparams.batch_size
    batches = [Preferences(lm, requests[i : i + size], first, hparams.with_end) for i in range(0, len(requests), size)]

    def objective(batch: Minibatch) -> Tensor:
        assert isinstance(batch, Preferences)
        return batch.objective(hparams.alpha, hparams.beta)

    return low_rank_edit(lm, sites, batches, hparams, objective, stop_below=None)


class Preferences(Minibatch):
    """Rows of new answers, then rows of the answers to move away from, with their likelihood before.

    Args:
        lm: The model, as it is before the training.
        requests: n of them.
        first: The lowest block whose output changes in the training.
        with_end: Whether the end-of-text token belongs to the answers.
    """

    def __init__(self, lm: LM, requests: Sequence[EditRequest], first: int, with_end: bool = False) -> None:
        asked = [(lm.text.render(request.prompt), request) for request in requests]
        pairs = [(prompt, request.target_new) for prompt, request in asked]
        pairs += [(prompt, str(request.target_neg)) for prompt, request in asked]
        super().__init__(lm, pairs, first, with_end=with_end)
        with torch.no_grad():
            self.reference = self.summed(self.log_probs())  # (2 n,)

    def summed(self, log_probs: Tensor) -> Tensor:
        """The log-probability of each answer, (2 n,), from those of its tokens."""
        rows = self.answers.rows.to(log_probs.device)
        return log_probs.new_zeros(len(self.answers.ids)).index_add(0, rows, log_probs)

    def objective(self, alpha: float, beta: float) -> Tensor:
        """The loss of the equation, the mean over the requests."""
        log_probs = self.log_probs()
        now = self.summed(log_probs)
        count = torch.bincount(self.answers.rows, minlength=len(now)).to(now)
        wanted, unwanted = (now - self.reference).chunk(2)
        entropy = -(now / count).chunk(2)[0]
        return (alpha * entropy - (1 - alpha) * logsigmoid(beta * (wanted - unwanted))).mean()
