"""FT_uns: fine-tuning on long free-text answers. Wu et al., AKEW, EMNLP 2024. arXiv:2402.18909.

Idea      FT on a question and its whole answer, however long, with the end of the answer.
Equation  The cross-entropy of FT-M over all tokens of the answer and the end-of-text token.
Changes   One projection per block in `layers`, densely.
Needs     Nothing but prompt and answer.
Relations FT with the end of the answer; LoRA_uns learns the same by adapters.
Deviates  `prompt_last`, which EasyEdit's file names, reads every token of an answer at the prompt's last position; no
          long answer can be learnt so, and the default is `target_new`.
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
class FT_uns_HyperParams(FineTuning):
    """Settings of FT_uns."""

    alg_name: str = "FT_uns"


@method("FT_uns", hparams=FT_uns_HyperParams, paper="arXiv:2402.18909", requests="many")
def ft_uns(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: FT_uns_HyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """The dense edit of any number of long answers."""
    return fine_tuned(lm, requests, hparams, with_end=True)
