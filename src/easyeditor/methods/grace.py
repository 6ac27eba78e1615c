"""GRACE: Aging with GRACE, lifelong model editing with discrete key-value adaptors. Hartvigsen et al., NeurIPS 2023.

arXiv:2211.11031

Idea      A codebook around one projection of a frozen model. An edit adds a ball around what the projection takes in at
          the prompt's last token; inside the ball the projection returns a value trained to give the new answer.
Equation  h(x) = value_i  if |x - key_i| <= radius_i for the nearest key i,  else f(x).
          A new key within reach of a ball of the same answer enlarges that ball; of another answer: both are halved.
Changes   No weight; one module is wrapped.
Needs     Nothing but prompt and answer.
Relations MELO switches LoRA blocks by the same kind of codebook.
Deviates  A layer cannot see where the prompt ends, so the codebook is consulted at every position, not only at the last
          one; with `replace_last` nothing then depends on padding, batching or the KV cache. The two other rules act on
          the tokens of one pass, as in the authors' code: they see a prompt only when it is read in one piece. Two
          answers at one and the same key: the newer one holds. The loss is that of the answer's tokens, and training
          ends at a loss of 5e-3 (`reg: early_stop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.learn import descend
from easyeditor.core.likelihood import Answers, answers, mean_per_row, token_log_probs
from easyeditor.core.memory import Codebook, Entry
from easyeditor.edits.edit import Edit, ModuleEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.hooks import capture, replace
from easyeditor.lm.model import LM
from easyeditor.lm.resume import Cut, cut_at, resumed
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

SOLVED = 5e-3


@dataclass(kw_only=True)
class GraceHyperParams(HyperParams):
    """Settings of GRACE."""

    alg_name: str = "GRACE"
    inner_params: list[str] = field(default_factory=list)  # the weight of the projection; empty: preset, else by depth
    edit_lr: float = 1.0  # Adam's step size for the value
    n_iter: int = 50  # steps for the value
    eps: float = 1.0  # radius of a new ball
    dist_fn: str = "euc"  # 'euc' or 'cos'
    val_init: str = "cold"  # the value starts at random ('cold') or at what the projection returns ('warm')
    val_train: str = "sgd"  # kept for existing files; 'sgd' means trained by gradients
    val_reg: str | None = None  # kept for existing files
    reg: str | None = "early_stop"  # 'early_stop': end when the loss is small
    replacement: str = "replace_last"  # 'replace_last', 'replace_prompt' or 'replace_all'
    eps_expand: str = "coverage"  # 'coverage' or 'moving_average'
    num_pert: int | str = 8  # kept for existing files; belongs to val_train 'pert'
    dropout: float = 0.0  # kept for existing files; editing is done without dropout

    def check(self) -> None:
        """Choices that exist."""
        allowed = {
            "dist_fn": ("euc", "cos"),
            "val_init": ("cold", "warm"),
            "replacement": ("replace_last", "replace_prompt", "replace_all"),
            "eps_expand": ("coverage", "moving_average"),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise UsageError(f"Setting '{name}' of GRACE is '{value}'. Choose {' or '.join(values)}.")
        if len(self.inner_params) > 1:
            raise UsageError("Setting 'inner_params' of GRACE names several weights. Name one: it wraps one module.")


@method("GRACE", hparams=GraceHyperParams, paper="arXiv:2211.11031", requests="one", kind="module", wrapper=Entry)
def grace(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: GraceHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> ModuleEdit:
    """The codebook entry of one fact."""
    request, site = requests[0], lm.site(hparams.inner_params[0])
    batch = answers(lm, [(lm.text.render(request.prompt), request.target_new)])
    position = int(batch.columns[0])  # of the token that predicts the first token of the answer
    below = 0 if lm.seq2seq else min(lm.block_of(site), len(lm.blocks) - 1)
    with (
        torch.no_grad(),
        capture(site.module, "input") as taken,
        capture(site.module) as given,
        cut_at(lm, below) as cut,
    ):
        lm.run(batch.ids, batch.mask, decoder_input_ids=batch.decoder_ids)
    key = taken[0].reshape(-1, taken[0].shape[-1])[position].float()
    start = given[0].reshape(-1, given[0].shape[-1])[position].float()
    value = _initial(start, request, history, site, key, hparams)
    with lm.frozen():
        losses = _train(lm, batch, cut, site, position, value, hparams)
    entry = Entry(key, value, request.target_new, hparams.eps, hparams.dist_fn, hparams.eps_expand, hparams.replacement)
    return ModuleEdit(wrappers={site.name: entry}, notes={"losses": losses})


def _initial(
    output: Tensor, request: EditRequest, history: Sequence[Edit], site: Site, key: Tensor, hparams: GraceHyperParams
) -> Tensor:
    """Where training starts: at the value of the ball that the key falls into, if the answer is the same."""
    earlier = [e.wrappers[site.name] for e in history if isinstance(e, ModuleEdit) and site.name in e.wrappers]
    entries = [entry for entry in earlier if isinstance(entry, Entry)]
    if entries:
        book = Codebook.of(entries)
        distance, index = book.nearest(key[None])
        i = int(index[0])
        if book.labels[i] == request.target_new and float(distance[0]) <= hparams.eps + float(book.radii[i]):
            return book.values[i].clone()
    if hparams.val_init == "warm":
        return output.clone()
    return torch.rand(output.shape, generator=torch.Generator().manual_seed(hparams.seed)).to(output.device)


def _train(
    lm: LM, batch: Answers, cut: Cut, site: Site, position: int, value: Tensor, hparams: GraceHyperParams
) -> list[float]:
    """Adam on the value, which stands where the codebook will put it."""

    def put(states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        place = torch.arange(len(flat), device=flat.device)
        reach = {"replace_last": place == position, "replace_prompt": place <= position}
        where = reach.get(hparams.replacement, place >= 0)
        return torch.where(where[:, None], value.to(flat), flat).reshape(states.shape)

    def losses() -> Tensor:
        with replace(site.module, put):
            if cut.first == 0:
                return -mean_per_row(token_log_probs(lm, batch), batch)
            with resumed(lm, cut, cut.states):
                return -mean_per_row(token_log_probs(lm, batch), batch)

    stop = SOLVED if hparams.reg == "early_stop" else None
    trace = descend([value], losses, steps=hparams.n_iter + 1, lr=hparams.edit_lr, stop_below=stop)
    return [step[0] for step in trace]
