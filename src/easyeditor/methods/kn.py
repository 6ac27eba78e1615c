"""KN: Knowledge Neurons in Pretrained Transformers. Dai et al., ACL 2022. arXiv:2104.08696.

Idea      A fact lives in a few feed-forward neurons. Find them by integrated gradients of the old answer's
          probability, and let what they write into the stream say the new answer instead of the old one.
Equation  W_i' = W_i - c E[old] + c E[new]  for each neuron i found;  W_i: what the neuron writes, E: the embeddings of
          the answer's tokens, summed over them;  c = 2 lr_scale for answers of one token, lr_scale for longer ones.
Changes   The MLP output projection of the blocks that hold a neuron, by one rank each.
Needs     The old answer (`ground_truth`); with `refine` also paraphrases (`rephrase_prompts`).
Relations ROME replaces one association of a projection instead of a few of its columns.
Deviates  E are the output embeddings, which is what the stream is read by. In a gated MLP a neuron may be below zero
          where it counts; it then gets the vectors with the other sign. As the neurons of a block all get one vector,
          the change is kept as one rank and not neuron by neuron. The method is weak (28.95 % on ZsRE with Llama-2 in
          EasyEdit's table): the same neurons serve other facts, and one vector says all tokens of an answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.neurons import Attribution, Chosen, attribution, coarse, refined
from easyeditor.edits.delta import Delta, LowRank
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import EditFailed, NotEditable, UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class KNHyperParams(HyperParams):
    """Settings of KN."""

    alg_name: str = "KN"
    steps: int = 20  # m, the steps of the integration
    adaptive_threshold: float = 0.2  # a neuron counts if its score is above this share of the largest
    refine: bool = False  # keep the neurons that the prompt and its paraphrases have in common
    p: float = 0.4  # which share of them has to have a neuron
    lr_scale: float = 1.0  # how many times the embeddings are added
    n_toks: int = 10  # kept for existing files
    batch_size: int = 1  # kept for existing files; the steps are batched by the number of tokens

    def check(self) -> None:
        """Numbers that mean something."""
        if self.steps < 1:
            raise UsageError(f"Setting 'steps' of KN is {self.steps}. Give at least 1; the paper takes 20.")
        for name in ("adaptive_threshold", "p"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UsageError(f"Setting '{name}' of KN is {value}. It is a share, from 0 to 1.")
        if not 0 < self.lr_scale < float("inf"):
            raise UsageError(f"Setting 'lr_scale' of KN is {self.lr_scale}. It has to be a number above 0.")


@method("KN", hparams=KNHyperParams, paper="arXiv:2104.08696", requests="one", needs=("ground_truth",))
def kn(
    lm: LM, requests: Sequence[EditRequest], hparams: KNHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The edit of one fact."""
    request = requests[0]
    assert request.ground_truth is not None
    prompts = [request.prompt, *(request.rephrase_prompts if hparams.refine else ())]
    found = [attribution(lm, lm.text.render(p), request.ground_truth, hparams.steps) for p in prompts]
    chosen = neurons_of(found, hparams)
    if not any(bool(each.any()) for each in chosen):
        raise EditFailed(
            f"KN found no neuron for '{request.prompt}' -> '{request.ground_truth}' that {hparams.p:.0%} of "
            f"{len(prompts)} prompts share. Lower p or adaptive_threshold, or turn refine off."
        )
    vector = _vector(lm, request.ground_truth, request.target_new) * hparams.lr_scale
    deltas: dict[str, Delta] = {}
    for layer, (mine, values) in enumerate(zip(chosen, found[0].values, strict=True)):
        if mine.any():
            site = lm.mlp_out(layer)
            sign = torch.where(mine, torch.where(values < 0, -1.0, 1.0), 0.0)
            deltas[site.weight_name] = LowRank(vector[:, None], sign[:, None].to(vector))
    neurons = {str(layer): mine.nonzero().flatten().tolist() for layer, mine in enumerate(chosen) if mine.any()}
    return WeightEdit(deltas=deltas, notes={"neurons": neurons, "probability": found[0].probability})


def neurons_of(found: Sequence[Attribution], hparams: KNHyperParams) -> Chosen:
    """The coarse set of the first prompt, or the set that all prompts refine."""
    sets = [coarse(each.scores, hparams.adaptive_threshold) for each in found]
    return refined(sets, hparams.p) if hparams.refine else sets[0]


def _vector(lm: LM, old: str, new: str) -> Tensor:
    """What a neuron writes more of: c (E[new] - E[old]), (width,), fp32."""
    table = getattr(lm.head, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] != lm.width:
        raise NotEditable(
            f"KN adds output embeddings to what neurons write, and the head of {lm.name} has none of the stream's "
            f"width {lm.width}. Choose a method that does without, such as FT."
        )
    said = [_tokens(lm, text) for text in (old, new)]
    times = 2.0 if all(len(tokens) == 1 for tokens in said) else 1.0
    e_old, e_new = (table.detach()[tokens].float().sum(0) for tokens in said)
    return times * (e_new - e_old)


def _tokens(lm: LM, text: str) -> list[int]:
    """The tokens of an answer as it stands behind a prompt."""
    if lm.seq2seq:
        ids = list(lm.text.encode(text).ids)
        return [token for token in ids if token not in lm.text.eos_ids] or ids
    encoded, first = lm.text.encode_pair("The answer is", text)
    return list(encoded.ids[first:])
