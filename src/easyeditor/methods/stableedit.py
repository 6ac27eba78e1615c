"""StableEdit: More Edits, More Stable, lifelong normalisation understood. ICML 2026. arXiv:2605.11836.

Idea      UltraEdit stays stable because it normalises gradients by the statistics of all edits. So the statistics
          start warm, from facts that are not edited, and g is whitened by its whole covariance; updates of different
          edits then become orthogonal and stay of bounded size.
Equation  h^ = (h - mean) / deviation,  g^ = S^(-1/2) (g - mean),  v = -lr |h^|^2 g^,  D = (H^T H + a I)^-1 H^T V
Changes   Each projection of `inner_params`, by as many ranks as there are answer tokens.
Needs     Prompt and answer; text for the warm-up.
Relations UltraEdit without the warm-up, with the diagonal of S and a = 1.
Deviates  The warm-up counts features and changes nothing; the authors leave what it writes on the model. Its facts are
          made from text (`warm_up_data`), each sentence with the last word of the next; theirs are a training set.
          Small eigenvalues of S are lifted to a share of the largest, not to 1e-6, which depends on the loss's scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.core.corpus import Corpus
from easyeditor.core.lifelong import joined, of_history, shape_of
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.lm.model import LM
from easyeditor.methods.ultraedit import UltraEditHyperParams, enough, features, warmed_up, written
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class StableEditHyperParams(UltraEditHyperParams):
    """Settings of StableEdit."""

    alg_name: str = "StableEdit"
    alpha: float = 10.0  # a, the weight of the change's own size
    warm_up: int = 2000  # made-up facts whose features count before the first edit; the authors take 20 steps of 100
    floor: float = 1e-2  # eigenvalues of the gradients' covariance are at least this share of the largest

    def check(self) -> None:
        """Whether the values make sense together."""
        super().check()
        if not 0 < self.floor <= 1:
            raise UsageError(f"Setting 'floor' of {self.alg_name} is {self.floor}. It is a share, above 0 and up to 1.")


def prepare(lm: LM, hparams: StableEditHyperParams, corpus: Corpus | None = None) -> Mapping[str, Any]:
    """The moments of the warm-up's features, by shape."""
    return {"warm_up": warmed_up(lm, hparams, corpus, whole=True)}


@method("StableEdit", hparams=StableEditHyperParams, paper="arXiv:2605.11836", requests="many", prepare=prepare)
def stableedit(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: StableEditHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests."""
    sites, found = features(lm, requests, hparams)
    moments = joined(sites, found, True, of_history(sites, history, True, state["warm_up"]))
    enough(moments, hparams)
    white = {site.name: moments[shape_of(site)].whitened(found[site.name], hparams.floor) for site in sites}
    return written(sites, found, white, hparams)
