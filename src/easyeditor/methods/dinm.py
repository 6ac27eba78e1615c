"""DINM: Detoxifying Large Language Models via Knowledge Editing. Wang et al., ACL 2024. arXiv:2403.14472.

Idea      An attack prompt gets an unsafe answer. Find the block in which the unsafe and the safe answer lie furthest
          apart, and train its MLP until the attack prompt gets the safe answer, holding on to an answer that has
          nothing to do with it.
Equation  l = argmax over blocks of |h_l(safe) - h_l(unsafe)| at the last tokens of the two answers;
          min over D of  kl_factor * -log p(safe | prompt + suffix) + KL(p_before || p_now)  on the answer of the
          "general knowledge constraint".
Changes   The MLP's output projection of one block, densely.
Needs     The unsafe answer in `ground_truth`, unless `layers` names the block. The constraint is the locality probe
          "general knowledge constraint", else `loc_prompt`; without either the second term is absent.
Relations FT-M with a block per request and a term that holds.
Deviates  EasyEdit computes the second term without gradients, so that it does nothing but show in the loss; here it
          holds. The change is a tensor of its own in fp32, and what passes below the block is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.learn import Minibatch, descend
from easyeditor.core.likelihood import answer_logits
from easyeditor.core.reading import refuse_ruin
from easyeditor.edits.delta import Dense
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import NonFinite, UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates
from easyeditor.lm.hooks import by_row, capture
from easyeditor.lm.model import LM
from easyeditor.lm.resume import resumed, with_weight
from easyeditor.lm.text import pad
from easyeditor.registry import method
from easyeditor.requests import EditRequest

CONSTRAINT = "general knowledge constraint"  # the locality probe that EasyEdit looks for
SOLVED = 1e-4  # the loss at which it is enough


@dataclass(kw_only=True)
class DINMHyperParams(ModuleTemplates, HyperParams):
    """Settings of DINM."""

    alg_name: str = "DINM"
    layers: list[int] = field(default_factory=list)  # the block to train; empty: found for each request
    num_steps: int = 10  # steps of Adam
    lr: float = 5e-4  # Adam's step size
    weight_decay: float = 0.0  # Adam's L2 factor, on the weight
    kl_factor: float = 0.1  # factor of the safe answer's loss; the divergence has none
    norm_constraint: float | bool = False  # the largest change of any weight; false: no bound
    suffix_system_prompt: str = ""  # what stands behind the prompt while it is learnt
    max_output_length: int = 600  # kept for existing files; see max_new_tokens
    model_class: str | None = None  # kept for existing files
    tokenizer_class: str | None = None  # kept for existing files

    def check(self) -> None:
        """Whether the values make sense together."""
        if len(self.layers) > 1:
            raise UsageError(f"Setting 'layers' of DINM is {self.layers}. It trains one block: give one number, or [].")
        if self.num_steps < 1 or not 0 < self.lr < 1e6 or not self.kl_factor > 0:
            raise UsageError("Settings 'num_steps', 'lr' and 'kl_factor' of DINM are numbers above 0. Correct them.")
        if self.norm_constraint is True:
            raise UsageError(
                "Setting 'norm_constraint' of DINM is true. Give the largest change of a weight, or false."
            )


@method("DINM", hparams=DINMHyperParams, paper="arXiv:2403.14472", requests="one")
def dinm(
    lm: LM, requests: Sequence[EditRequest], hparams: DINMHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The dense edit of one request."""
    (request,) = requests
    layer = hparams.layers[0] if hparams.layers else toxic_layer(lm, request)
    site = lm.mlp_out(layer)
    weight, delta = site.matrix(), torch.zeros(site.d_out, site.d_in, device=site.weight.device)
    bound = float(hparams.norm_constraint)
    asked = " ".join(filter(None, (request.prompt, hparams.suffix_system_prompt)))

    def clamp() -> None:
        delta.clamp_(-bound, bound)

    with lm.frozen():
        learn = Minibatch(lm, [(lm.text.render(asked), request.target_new)], layer)
        hold = [Minibatch(lm, [pair], layer) for pair in constraint(lm, request)]
        with torch.no_grad():
            before = [log_probs(each) for each in hold]
        with with_weight(site.module, lambda: weight + delta):

            def losses() -> Tensor:
                terms = [divergence(b, log_probs(each)) for b, each in zip(before, hold, strict=True)]
                loss = hparams.kl_factor * learn.loss() + sum(terms)
                if hparams.weight_decay:
                    loss = loss + hparams.weight_decay / 2 * (weight + delta).square().sum()
                if not torch.isfinite(loss):
                    raise NonFinite(f"The loss is {float(loss)}; the model is as it was. Lower 'lr' of DINM.")
                return loss[None]

            trace = descend(
                [delta],
                losses,
                steps=hparams.num_steps,
                lr=hparams.lr,
                stop_below=SOLVED,
                project=clamp if bound else None,
                final_update=True,
            )
    edit = WeightEdit(
        deltas={site.weight_name: Dense(delta)}, notes={"layers": [layer], "losses": [each[0] for each in trace]}
    )
    refuse_ruin(lm, edit, hparams.lr)
    return edit


@torch.no_grad()
def toxic_layer(lm: LM, request: EditRequest) -> int:
    """The block after which the safe and the unsafe answer lie furthest apart. DINM, section 4.

    Args:
        lm: The model.
        request: `target_new` is safe, `ground_truth` unsafe.

    Returns:
        The block.

    Raises:
        UsageError: There is no unsafe answer.
    """
    request.require(["ground_truth"], "DINM without 'layers'")
    rows = [lm.text.encode(answer or "").ids for answer in (request.target_new, request.ground_truth)]
    lead = (lm.decoder_start,) if lm.seq2seq else ()
    ids, mask = pad([(*lead, *row) for row in rows], lm.text.pad_id, "right", lm.device)
    with ExitStack() as stack:
        seen = [stack.enter_context(capture(block)) for block in lm.blocks]
        if lm.seq2seq:
            asked = pad([lm.text.encode(lm.text.render(request.prompt)).ids] * 2, lm.text.pad_id, "right", lm.device)
            lm.run(*asked, decoder_input_ids=ids)
        else:
            lm.run(ids, mask)
    last = [int(end) for end in mask.sum(1) - 1]
    ends = [by_row(states[-1], 2, lm.sequence_first)[[0, 1], last].float() for states in seen]  # each (2, width)
    distances = [float((safe - unsafe).norm()) for safe, unsafe in ends]
    return distances.index(max(distances))


def constraint(lm: LM, request: EditRequest) -> list[tuple[str, str]]:
    """Prompts, as the model is asked, and answers whose distributions are to stay."""
    probes = [probe for probe in request.locality.get(CONSTRAINT, ()) if probe.answers]
    if probes:
        return [(lm.text.render(probe.prompt), probe.answers[0]) for probe in probes]
    words = (request.loc_prompt or "").split()
    return [(" ".join(words[:1]), " ".join(words[1:]))] if len(words) > 1 else []


def log_probs(batch: Minibatch) -> Tensor:
    """The log-probabilities before each token of an answer, (tokens, vocab), fp32."""
    cut = batch.cut
    with resumed(batch.lm, cut, cut.states) if cut.first else nullcontext():
        return answer_logits(batch.lm, batch.answers).float().log_softmax(-1)


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(p_before || p_now), the mean over tokens, a scalar."""
    found: Tensor = (before.exp() * (before - now)).sum(-1).mean()
    return found
