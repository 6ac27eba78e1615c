"""UnKE: Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models.

Deng et al., ICLR 2025. arXiv:2405.15349

Idea      A long answer in free text is no triple with a subject. Find the state at the last token of the question from
          which the whole answer follows, then train a whole block so that it returns this state there and what it
          returned before everywhere else.
Equation  d* = argmin -log p(answer | question, h + d),  |d| <= clamp |h|;
          min over the block of |f(x) - (h + d*)|^2 at the last token + |f(x) - h|^2 at all other tokens.
Changes   Every projection of one block, densely.
Needs     Text whose states are to stay (`ex_dataset`), of which `ex_data_num` samples are drawn.
Relations AnyEdit cuts the answer into windows, each with a state of its own.
Deviates  Biases and norms of the block stay as they are. The last token's error has a mean of its own, and so have all
          other places, those of the answer among them; the authors take the mean over all tokens of the question, where
          one in twenty would count a twentieth. The block is trained in fp32 whatever the model's dtype. In an
          encoder-decoder model the last token is the one that the decoder begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

from easyeditor.core.block import trained
from easyeditor.core.corpus import Corpus, read_corpus
from easyeditor.core.reading import refuse_ruin
from easyeditor.core.states import VectorSettings, wanted
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest

POOL = 2_000  # of the first so many texts of a corpus, samples are drawn


@dataclass(kw_only=True)
class unkeHyperParams(ModuleTemplates, HyperParams):
    """Settings of UnKE."""

    alg_name: str = "UnKE"
    layers: list[int] = field(default_factory=list)  # the block to train, one number; empty: preset row, else by depth
    layer_selection: str = "all"  # kept for existing files
    fact_token: str = "last"  # where the state stands: the last token of the question, the only one
    lr: float = 2e-4  # Adam's step size for the block
    optim_num_step: int = 50  # steps for the block
    v_num_grad_steps: int = 25  # forward passes for a state
    v_lr: float = 0.5  # Adam's step size for a state
    v_loss_layer: int | None = None  # kept for existing files; the loss is on the model's own logits
    v_weight_decay: float = 1e-3  # factor of |d| / |h|^2
    clamp_norm_factor: float = 4.0  # the largest |d| / |h|
    ex_data_num: int = 20  # how many texts are to stay as they are
    ex_dataset: str = "wikipedia"  # where they are from: a text or JSONL file, or a data set id

    def check(self) -> None:
        """Whether the values make sense together."""
        name = self.alg_name
        if len(self.layers) > 1:
            raise UsageError(f"Setting 'layers' of {name} is {self.layers}. It trains one block: give one number.")
        if self.fact_token != "last":
            raise UsageError(f"Setting 'fact_token' of {name} is '{self.fact_token}'. 'last' is the only one.")
        for key in ("optim_num_step", "v_num_grad_steps"):
            if getattr(self, key) < 1:
                raise UsageError(f"Setting '{key}' of {name} is {getattr(self, key)}. Give at least 1.")
        for key in ("lr", "v_lr", "clamp_norm_factor"):
            if not 0 < getattr(self, key) < 1e6:
                raise UsageError(f"Setting '{key}' of {name} is {getattr(self, key)}. Give a number above 0.")
        for key in ("ex_data_num", "v_weight_decay"):
            if not 0 <= getattr(self, key) < 1e6:
                raise UsageError(f"Setting '{key}' of {name} is {getattr(self, key)}. Give a number from 0 on.")


def prepare(lm: LM, hparams: unkeHyperParams, corpus: Corpus | None = None) -> Mapping[str, Any]:
    """The texts whose states are to stay."""
    if not hparams.ex_data_num:
        return {"texts": []}
    pool = list(islice(read_corpus(corpus if corpus is not None else hparams.ex_dataset), POOL))
    return {"texts": Random(hparams.seed).sample(pool, min(hparams.ex_data_num, len(pool)))}


@method("UnKE", hparams=unkeHyperParams, paper="arXiv:2405.15349", requests="many", prepare=prepare)
def unke(
    lm: LM, requests: Sequence[EditRequest], hparams: unkeHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """One edit for all requests."""
    return written(lm, requests, hparams, state)


def written(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: unkeHyperParams,
    state: Mapping[str, Any],
    window: int | None = None,
    overlap: int = 0,
) -> WeightEdit:
    """Find the states of answers and train the block.

    Args:
        lm: The model; it is left as it was.
        requests: Questions and answers.
        hparams: Complete settings.
        state: What `prepare` returned.
        window: The tokens of a window; None: the whole answer is one.
        overlap: How many of them the next window has as well.
    """
    (layer,) = hparams.layers
    lm.mlp_out(layer)  # a block that is not there is refused by name
    pairs = [(lm.text.render(request.prompt), request.target_new) for request in requests]
    settings = VectorSettings(
        hparams.v_num_grad_steps, hparams.v_lr, hparams.v_weight_decay, hparams.clamp_norm_factor, window, overlap
    )
    with lm.frozen():
        found = wanted(lm, pairs, layer, settings)
        deltas, losses = trained(lm, layer, found, state["texts"], steps=hparams.optim_num_step, lr=hparams.lr)
    states = [loss for each in found for loss in each.losses]
    edit = WeightEdit(deltas=deltas, notes={"layers": [layer], "state_losses": states, "losses": losses})
    refuse_ruin(lm, edit, hparams.lr)
    return edit
