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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.core.fine_tuning import fine_tuned
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.hparams.fine_tuning import FineTuning
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class FTHyperParams(FineTuning):
    """Settings of FT."""

    alg_name: str = "FT"


@method("FT", hparams=FTHyperParams, paper="arXiv:2012.00363", requests="many")
def ft(
    lm: LM, requests: Sequence[EditRequest], hparams: FTHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The dense edit of any number of facts."""
    return fine_tuned(lm, requests, hparams)
