"""AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models. Fang et al., ICLR 2025. arXiv:2410.02355.

Idea      MEMIT, but the change is projected onto the directions that text hardly uses, and the keys of earlier edits
          are kept as they are.
Equation  D = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1,  P = U U^T, U: eigenvectors of C with an eigenvalue below the
          absolute threshold `nullspace_threshold`;  K_p: the keys of earlier edits.
Changes   The MLP output projection of each block, by as many ranks as there are facts.
Needs     The subject; C.
Relations In the basis of P it is least squares with A = L2 I and projected keys: with P = I and no past, MEMIT with
          C = I. SPHERE projects its change once more.
Deviates  Nothing in the result. U or its complement is stored, whichever is thinner, instead of P. K_p is what the
          edits on the ledger carry: taking an edit back takes its keys out of the history as well. The authors compute
          K_p anew after the edit, which gives the same keys: what a block takes in does not change with its own weight.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.closed_form import find, into_last_block, mlp_sites, moments
from easyeditor.core.prompts import contexts
from easyeditor.core.solve import System, null_space
from easyeditor.core.stats import Corpus
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.family import LeastSquares
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AlphaEditHyperParams(LeastSquares):
    """Settings of AlphaEdit."""

    alg_name: str = "AlphaEdit"
    history: bool = True  # whether the keys of earlier edits are kept as they are
    nullspace_threshold: float = 2e-2  # eigenvalues of C below it count as zero; absolute
    L2: float = 10.0  # the weight of the change's own size
    P_loc: str | None = None  # a file with P of each block, as the authors' code saves it; None: P is computed

    def check(self) -> None:
        """Whether the values make sense together."""
        super().check()
        if not self.L2 > 0:
            raise UsageError(f"Setting 'L2' of {self.alg_name} is {self.L2}. It has to be above 0.")
        if not self.nullspace_threshold > 0:
            raise UsageError(
                f"Setting 'nullspace_threshold' of {self.alg_name} is {self.nullspace_threshold}. It has to be above "
                "0: eigenvalues of the second moment below it count as zero."
            )


def prepare(lm: LM, hparams: AlphaEditHyperParams, corpus: Corpus | None = None) -> Mapping[str, Any]:
    """The contexts that the model writes, and the null space of each block."""
    sites = mlp_sites(lm, hparams.layers)
    ridge = hparams.L2 + hparams.update_norm_lambda
    p: dict[str, Any] = _saved(hparams, sites)
    for name, moment in ({} if p else moments(lm, sites, hparams, corpus)).items():
        p[name] = null_space(moment.to(lm.device), hparams.nullspace_threshold, name) if moment is not None else None
    texts = contexts(lm, hparams.context_template_length_params, hparams.seed)
    systems = {site.weight_name: System(None, ridge, project=p[site.weight_name], size=site.d_in) for site in sites}
    return {"contexts": texts, "systems": systems}


def _saved(hparams: AlphaEditHyperParams, sites: Sequence[Site]) -> dict[str, Any]:
    """P of each block from a file, as functions of keys; empty if there is none."""
    if hparams.P_loc is None:
        return {}
    path = Path(hparams.P_loc)
    if not path.is_file():
        log.info("There is no file '%s' (P_loc): the projections are computed.", path)
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        raise UsageError(
            f"P_loc '{path}' cannot be read as a tensor ({type(error).__name__}). Leave P_loc out; P is then computed."
        ) from None
    shapes = [(site.d_in, site.d_in) for site in sites]
    if not isinstance(found, Tensor) or not found.dim() or [tuple(p.shape) for p in found] != shapes:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"P_loc '{path}' holds {shape}; expected {len(sites)} matrices of {shapes[0]}, one per block. "
            "Leave P_loc out; P is then computed."
        )
    return {site.weight_name: partial(_product, p) for site, p in zip(sites, found, strict=True)}


def _product(p: Tensor, keys: Tensor) -> Tensor:
    return p.to(keys) @ keys


@method(
    "AlphaEdit",
    hparams=AlphaEditHyperParams,
    paper="arXiv:2410.02355",
    requests="many",
    needs=("subject",),
    prepare=prepare,
)
def alphaedit(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: AlphaEditHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests."""
    found = find(lm, requests, hparams, state, hparams.layers[-1])
    return into_last_block(lm, found, hparams, state, history)
