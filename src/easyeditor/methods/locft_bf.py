"""LocFT-BF: Fine-tuning Done Right in Model Editing. Yang et al., ICLR 2026. arXiv:2509.22072.

Idea      Plain fine-tuning, done as fine-tuning is done: mini-batches over all requests, epoch by epoch, instead of one
          request after the other to the end; one located module; an answer is learnt with its end.
Equation  min over W of the mean over all requests of the cross-entropy of answer and end-of-text token.
          A mini-batch whose loss is below 1e-2 is skipped.
Changes   The MLP's output projection of one block, densely; with `whole_block` all projections of the block.
Needs     Nothing but prompt and answer; its strength is many requests at once: all that are edited together are learnt
          together, `mini_batch` at a time.
Relations FT-M with mini-batches over all requests and with the end of the answer.
Deviates  The change is a tensor of its own in fp32, whatever the model's dtype, and what passes below the block is
          computed once. The training also ends when the mean loss of an epoch is below 1e-2. `whole_block` leaves
          norms as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.core.fine_tuning import fine_tuned
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.fine_tuning import FineTuning
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class LocFTBFHyperParams(FineTuning):
    """Settings of LocFT-BF."""

    alg_name: str = "LocFT-BF"
    batch_size: int = 1000  # requests per edit where a run makes several: the more, the better
    mini_batch: int = 100  # requests per step
    whole_block: bool = False  # train all projections of the block

    def check(self) -> None:
        """Sizes that mean something."""
        super().check()
        if self.mini_batch < 1:
            raise UsageError("Setting 'mini_batch' of LocFT-BF is a number from 1 on. Correct it.")


@method("LocFT-BF", hparams=LocFTBFHyperParams, paper="arXiv:2509.22072", requests="many")
def locft_bf(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: LocFTBFHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """The dense edit of any number of facts."""
    return fine_tuned(lm, requests, hparams, with_end=True, size=hparams.mini_batch, whole_blocks=hparams.whole_block)
