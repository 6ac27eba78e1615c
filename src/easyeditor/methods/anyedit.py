"""AnyEdit: Edit Any Knowledge Encoded in Language Models. Jiang et al., ICML 2025. arXiv:2502.05628; UnKE_ARE.

Idea      One state cannot carry an answer of any length. Cut the answer into windows, and give each the state of the
          token in front of it, found one window after another with the earlier ones in place.
Equation  d_w* = argmin -log p(window w | question, windows before, h_1 + d_1*, ..., h_w + d_w),  |d_w| <= clamp |h_w|;
          then one block is trained to return all h_w + d_w*, as in UnKE.
Changes   Every projection of one block, densely.
Needs     Text whose states are to stay (`ex_dataset`), of which `ex_data_num` samples are drawn.
Relations With a window as long as the answer it is UnKE. The authors also put windows around MEMIT and AlphaEdit.
Deviates  As UnKE does. A window ends where its tokens do, not at a full stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.lm.model import LM
from easyeditor.methods.unke import prepare, unkeHyperParams, written
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class unkeAREHyperParams(unkeHyperParams):
    """Settings of AnyEdit."""

    alg_name: str = "AnyEdit"
    window_size: int = 50  # tokens of a window
    overlap: int = 0  # how many of them the next window has as well

    also: ClassVar[tuple[str, ...]] = ("UnKE_ARE",)

    def check(self) -> None:
        """Whether the values make sense together."""
        super().check()
        if not 0 <= self.overlap < self.window_size:
            raise UsageError(
                f"Settings 'window_size' and 'overlap' of {self.alg_name} are {self.window_size} and {self.overlap}. "
                "A window has at least one token that the one before it does not have."
            )


@method(
    "AnyEdit",
    hparams=unkeAREHyperParams,
    paper="arXiv:2502.05628",
    requests="many",
    aliases=("UnKE_ARE",),
    prepare=prepare,
)
def anyedit(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: unkeAREHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests."""
    return written(lm, requests, hparams, state, hparams.window_size, hparams.overlap)
