"""KE: Editing Factual Knowledge in Language Models. De Cao et al., EMNLP 2021. arXiv:2104.08164.

Idea      A network reads the request (old answer, new answer, prompt) and says how each weight's gradient is to be
          masked and what is to be added, so that the new answer holds; training bounds what else may move.
Equation  D = s(eta) (softmax(alpha) beta^T * grad + softmax(gamma) delta^T), * by element, equations 5 to 7, where
          alpha ... eta are a layer's reading of an LSTM's state; trained on  min -log p'(new answer)  subject to
          KL(p || p')(what must not move) <= m, by its Lagrangian, whose multiplier ascends.
Changes   Each projection of `inner_params`, by as many ranks as the fact has tokens with a gradient, and one.
Needs     Prompt and answer, and an archive that `easyedit train` wrote for this model.
Relations The masked gradient is of low rank as the gradient is: (softmax(alpha) * g)(beta * h)^T for each token. MEND
          maps g and h themselves and reads nothing else.
Deviates  The reading begins where D is `edit_lr` times a step down the gradient; `edit_lr` is learned, one for each
          projection. The embeddings are the model's own and are not trained, layers have no weight normalisation, the
          margin m stays, and no other norm of D is bounded. Where the old answer is not told, it is what the model
          says. `cedit` and `cloc` do not train: they weigh what the best archive is chosen by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.archive import base_of
from easyeditor.core.gates import Editor
from easyeditor.core.rehearsal import Before, drawn, rehearsed, together
from easyeditor.core.restored import archive_of, fill
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained, named_once
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

TOKENS = "mask"  # the gradient of the whole weight
SIZES = ("lstm_dim", "condition_dim", "hidden_dim")


@dataclass(kw_only=True)
class _Ke(Trained):
    """What the network looks like and what it learns."""

    alg_name: str = "KE"
    inner_params: list[str] = field(default_factory=list)  # the projections; empty: preset row, else by depth
    lr: float = 1e-5  # the step size of what is trained
    edit_lr: float = 1e-2  # where the learned steps begin
    lr_lr: float = 1e-3  # the step size of these steps
    lr_alpha: float = 0.1  # the step size of the multiplier
    margin: float = 1e-3  # m, how far what must not move may move, in nats
    cedit: float = 0.1  # weight of the new answer's loss in what archives are compared by
    cloc: float = 1.0  # weight of the divergence there
    lstm_dim: int = 128  # of the LSTM's state, in each direction
    condition_dim: int = 1024  # of what is made of it
    hidden_dim: int = 128  # of the layer before alpha ... eta
    rephrases: int = 1  # other wordings of a fact that the new answer is learnt on, per visit
    probes: int = 1  # probes of a fact that are kept from moving, per visit
    cbase: float = 1.0  # kept for existing files; the model itself is never trained

    def check(self) -> None:
        """Sizes and weights that mean something."""
        super().check()
        for name in ("cedit", "cloc", "lr_lr", "lr_alpha", "margin"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UsageError(f"Setting '{name}' of KE is {value}. It has to be a number, 0 or above.")
        for name in (*SIZES, "probes"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"Setting '{name}' of KE is {value}. It has to be a number from 1 on.")
        if self.rephrases < 0:
            raise UsageError(f"Setting 'rephrases' of KE is {self.rephrases}. It has to be a number, 0 or above.")
        named_once(self.alg_name, self.inner_params)


@dataclass(kw_only=True)
class KETrainingHparams(_Ke):
    """Settings of the training of KE."""

    alg: str = "KE"  # alg_name under its other name

    def editor(self, lm: LM) -> Trainable:
        """What is trained, on a model."""
        return KETraining(lm, self)


@dataclass(kw_only=True)
class KEHyperParams(_Ke):
    """Settings of KE."""

    training: ClassVar[type[Trained]] = KETrainingHparams

    lr_scale: float = 1.0  # factor of the learned steps
    max_output_length: int | None = None  # kept for existing files


class Request:
    """The text by which a request is told to the network, as embeddings of the model.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LM) -> None:
        self.lm, self.table = lm, lm.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def name(self) -> str:
        """The embeddings' name among the model's weights."""
        return next(name for name, weight in self.lm.model.named_parameters() if weight is self.table.weight)

    def __call__(self, request: EditRequest) -> Tensor:
        """``old answer >> new answer || prompt``, (length, width)."""
        prompt = self.lm.text.render(request.prompt)
        old = request.ground_truth or answer(self.lm, [request.prompt], 16)[0]
        ids = self.lm.text.encode(f"{old} >> {request.target_new} || {prompt}").ids
        with torch.no_grad():
            return self.table.weight[torch.tensor(ids, device=self.table.weight.device)].float()  # type: ignore[no-any-return]


class KETraining:
    """KE as the trainer sees it; see `easyeditor.core.training.Trainable`.

    Args:
        lm: The model, without edits.
        hparams: Complete settings.
    """

    def __init__(self, lm: LM, hparams: KETrainingHparams) -> None:
        self.lm, self.hparams, self.text = lm, hparams, Request(lm)
        self.sites = [lm.site(path) for path in hparams.inner_params]
        self.module = _network(self.text, self.sites, hparams, hparams.seed)
        self.before = Before(lm, self.sites, TOKENS, hparams.cache_gb * 2**30, hparams.seed)
        self._texts: dict[tuple[bool, int], Tensor] = {}
        if hparams.archive is not None:
            archive = archive_of(hparams.archive, lm, "KE")
            fill(self.module, archive.tensors, archive, lm)

    def prepare(self, visits: Sequence[Visit]) -> None:
        """Nothing: the network sees no means."""

    def parameters(self) -> list[dict[str, Any]]:
        """The network; the steps; the multiplier, which ascends."""
        own = {id(self.module.lrs), id(self.module.multiplier)}
        return [
            {"params": [p for p in self.module.parameters() if id(p) not in own]},
            {"params": [self.module.lrs], "lr": self.hparams.lr_lr},
            {"params": [self.module.multiplier], "lr": self.hparams.lr_alpha, "maximize": True},
        ]

    def losses(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """The Lagrangian of some edits, and its parts, (edits,)."""
        known = [[(visit, self.before(visit)) for visit in group] for group in groups]
        owner = torch.tensor([edit for edit, group in enumerate(groups) for _ in group])
        found = together([[self.before.gradient(visit)] for group in groups for visit in group])
        changes = self.module(found, [self._text(visit) for group in groups for visit in group])
        changes = {name: dataclasses.replace(each, rows=owner[each.rows.cpu()]) for name, each in changes.items()}
        rows = drawn(known, self.hparams.seed, self.hparams.rephrases, self.hparams.probes)
        out = rehearsed(self.lm, self.sites, rows, changes, len(groups)).per_edit(len(groups))
        with torch.no_grad():
            self.module.multiplier.clamp_(min=0)
            chosen_by = self.hparams.cedit * out["loss/edit"] + self.hparams.cloc * out["loss/loc"]
        total = out["loss/edit"] + self.module.multiplier * (out["loss/loc"] - self.hparams.margin)
        multiplier = self.module.multiplier.detach().expand(len(groups))
        return {**out, "loss/total_edit": chosen_by, "multiplier": multiplier, TOTAL: total}

    def header(self) -> dict[str, Any]:
        """The projections, with the fingerprints of their weights and of the embeddings."""
        names = [site.weight_name for site in self.sites]
        return {"inner_params": names, "base": base_of(self.lm, [*names, self.text.name])}

    def _text(self, visit: Visit) -> Tensor:
        if visit.key not in self._texts:
            self._texts[visit.key] = self.text(visit.request)
        return self._texts[visit.key]


def prepare(lm: LM, hparams: KEHyperParams, corpus: Any = None) -> dict[str, Any]:
    """The trained network, read from the archive.

    Raises:
        UsageError: No archive is named, or there is none.
        WrongBase: It was trained on another model.
        DamagedFile: It cannot be read.
    """
    archive = archive_of(hparams.archive, lm, "KE")
    said = archive.header.get("settings", {})
    sites = [lm.site(path) for path in archive.header.get("inner_params") or hparams.inner_params]
    full = KEHyperParams(**{name: said.get(name, getattr(hparams, name)) for name in SIZES})
    network = _network(Request(lm), sites, full, 0)
    fill(network, archive.tensors, archive, lm)
    return {"network": network.requires_grad_(False).eval(), "sites": [site.name for site in sites]}


@method("KE", hparams=KEHyperParams, paper="arXiv:2104.08164", requests="many", prepare=prepare)
@torch.no_grad()
def ke(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: KEHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests: the sum of their changes."""
    sites, text = [lm.site(path) for path in state["sites"]], Request(lm)
    before = Before(lm, sites, TOKENS, 0.0)
    found = together([[before.factors(request)] for request in requests])
    changes = state["network"](found, [text(request) for request in requests])
    return WeightEdit(
        deltas={
            name: LowRank((each.gradients * hparams.lr_scale).T.contiguous(), each.inputs.T.contiguous())
            for name, each in changes.items()
        }
    )


def _network(text: Request, sites: Sequence[Site], hparams: _Ke, seed: int) -> Editor:
    shapes = {site.weight_name: (site.d_out, site.d_in) for site in sites}
    sizes = [getattr(hparams, name) for name in SIZES]
    network = Editor(text.table.weight.shape[1], shapes, sizes, hparams.edit_lr, seed)
    return network.to(text.table.weight.device)
