"""ROME: Locating and Editing Factual Associations in GPT. Meng et al., NeurIPS 2022. arXiv:2202.05262.

Idea      An MLP's output projection W is an associative memory. One fact is one key k* (the subject, as the projection
          takes it in) and one value v* (what must come out for the new answer to follow). Write the pair.
Equation  W' = W + (v* - W k*) (C^-1 k*)^T / ((C^-1 k*)^T k*),  C = E[k k^T] over text.
Changes   One weight, by rank one.
Needs     The subject. C, unless mom2_adjustment is off: then C is the identity.
Relations EMMET with one key is ROME. R-ROME is the name for using one and the same k* throughout, as is done here.
Deviates  The authors' code takes k* over contexts in C^-1 k* and from the bare prompt elsewhere, so that W' k* = v*
          holds for neither; the paper has one k*, and so has this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.core.keys import mean_key
from easyeditor.core.prompts import contexts
from easyeditor.core.solve import cholesky, equality
from easyeditor.core.stats import Corpus, second_moments
from easyeditor.core.values import ValueSettings, values
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class ROMEHyperParams(ModuleTemplates, HyperParams):
    """Settings of ROME."""

    alg_name: str = "ROME"
    layers: list[int] = field(default_factory=list)  # the one block to edit; empty: preset row, else by depth
    fact_token: str = "subject_last"  # where the fact is written; the paper's choice and the only one here
    v_num_grad_steps: int = 20  # forward passes of the value optimisation
    v_lr: float = 0.5  # Adam's step size
    v_loss_layer: int | None = None  # kept for existing files; the loss is on the model's own logits
    v_weight_decay: float = 0.5  # factor of |d| / |v|^2
    clamp_norm_factor: float = 4.0  # the largest |d| / |v|
    kl_factor: float = 0.0625  # factor of the divergence on '{subject} is a'
    mom2_adjustment: bool = False  # whether C is taken from text
    context_template_length_params: list[list[int]] = field(  # [tokens, texts] of what is sampled to stand in front
        default_factory=lambda: [[5, 10], [10, 10]]
    )
    mom2_dataset: str = "wikipedia"  # a text file, one document per line; 'tinyfacts': the bundled one
    mom2_n_samples: int = 100_000  # how many documents at most
    mom2_dtype: str = "float32"  # kept for existing files; sums are fp64
    stats_dir: str | None = None  # where C is kept between runs

    def check(self) -> None:
        """One block, at the subject's last token."""
        if self.fact_token != "subject_last":
            raise UsageError(f"Setting 'fact_token' of ROME is '{self.fact_token}'. The paper's is 'subject_last'.")
        if len(self.layers) > 1:
            raise UsageError(f"Setting 'layers' of ROME is {self.layers}. ROME edits one block: give one number.")


def prepare(lm: LM, hparams: ROMEHyperParams, corpus: Corpus | None = None) -> Mapping[str, Any]:
    """The contexts that the model writes, and C of the edited site; both belong to the model before any edit.

    Args:
        lm: The model.
        hparams: Complete settings.
        corpus: Text for C; None: what ``mom2_dataset`` names.
    """
    state: dict[str, Any] = {"contexts": contexts(lm, hparams.context_template_length_params, hparams.seed)}
    if hparams.mom2_adjustment:
        site = lm.mlp_out(hparams.layers[0])
        moments = second_moments(
            lm,
            [site],
            corpus if corpus is not None else hparams.mom2_dataset,
            samples=hparams.mom2_n_samples,
            cache_dir=hparams.stats_dir,
        )
        state["factor"] = cholesky(moments[site.weight_name].matrix.double())  # once; each edit is then two solves
    return state


@method("ROME", hparams=ROMEHyperParams, paper="arXiv:2202.05262", requests="one", needs=("subject",), prepare=prepare)
def rome(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: ROMEHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """The rank-one edit of one fact."""
    layer = hparams.layers[0]
    site = lm.mlp_out(layer)
    settings = ValueSettings(
        steps=hparams.v_num_grad_steps,
        lr=hparams.v_lr,
        weight_decay=hparams.v_weight_decay,
        clamp=hparams.clamp_norm_factor,
        kl_factor=hparams.kl_factor,
    )
    k = mean_key(lm, requests[0], site, state["contexts"])[:, None]  # k*, (d_in, 1)
    value = values(lm, requests, layer, state["contexts"], settings)[0]
    residual = value.delta[:, None].to(k.device)  # v* - W k*, (d_out, 1)
    return WeightEdit(
        deltas={site.weight_name: equality(k, residual, factor=state.get("factor"))},
        keys={site.weight_name: k},
        residuals={site.weight_name: residual},
        notes={"layer": layer, "losses": value.losses, "contexts": list(state["contexts"])},
    )
