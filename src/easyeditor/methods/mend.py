"""MEND: Fast Model Editing at Scale. Mitchell et al., ICLR 2022. arXiv:2110.11309.

Idea      A small network, trained once per model, turns the gradient of one fact into a change that makes the fact
          hold and leaves the rest alone. An edit is one forward and one backward pass.
Equation  u~, v~ = g(u, v) for each token, where g is two layers z + ReLU(s (U V z + b) + o), equation 3;
          D = -lr sum v~ u~^T;  trained on  cedit (-log p'(new answer)) + cloc KL(p || p')(probes), equation 4
Changes   Each projection of `inner_params`, by as many ranks as the fact has tokens with a gradient.
Needs     Prompt and answer, and an archive that `easyedit train` wrote for this model.
Relations UltraEdit uses the same pairs without a network. MALMEN aggregates the changes of many facts.
Deviates  u and v are normalised by means and deviations taken over the training set before the first step, not while
          the network learns. Facts of one batch do not share a loss, so the change of a batch is the sum of those of
          its facts. What follows the new answer is kept from moving too. `edit_lr` is a step down the gradient; in
          archives of EasyEdit it is one up, and is turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.archive import Archive, base_of
from easyeditor.core.hypernetwork import Design, Hypernetwork
from easyeditor.core.rehearsal import Before, drawn, rehearsed, together
from easyeditor.core.restored import archive_of, fill
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained, named_once
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

TOKENS = "mask"  # the paper takes every token of prompt and answer
SEEN_BEFORE = 1000  # requests of the training set that means and deviations are taken over


@dataclass(kw_only=True)
class _Mend(Trained):
    """What the network looks like and what it learns; the archive holds to it afterwards."""

    alg_name: str = "MEND"
    inner_params: list[str] = field(default_factory=list)  # the projections; empty: preset row, else by depth
    edit_lr: float = 1e-4  # where the learned steps begin
    lr_lr: float = 1e-4  # the step size of these steps
    cedit: float = 0.1  # weight of the new answer's loss
    cloc: float = 1.0  # weight of the divergence on what must not move
    rank: int = 1920  # of the layers, at most their width
    n_hidden: int = 1  # layers besides the last one
    combine: bool = True  # one network on [u, v]; false: one on each
    one_sided: bool = False  # on the one of u and v with fewer numbers only
    x_only: bool = False  # on u only
    delta_only: bool = False  # on v only
    norm: bool = True  # whether u and v are normalised
    shared: bool = True  # whether projections of one shape share the network
    rephrases: int = 1  # other wordings of a fact that the new answer is learnt on, per visit
    probes: int = 1  # probes of a fact that are kept from moving, per visit
    init: str = "id"  # kept for existing files; every network begins as the identity
    mlp_class: str = "IDMLP"  # kept for existing files
    act: str = "relu"  # kept for existing files
    hidden_dim: Any = None  # kept for existing files; IDMLP's layers are as wide as what they take
    cbase: float = 1.0  # kept for existing files; the model itself is never trained

    def check(self) -> None:
        """A network that exists, and weights that mean something."""
        super().check()
        name = self.alg_name
        for setting, only in (("init", "id"), ("mlp_class", "IDMLP"), ("act", "relu")):
            if (value := getattr(self, setting)) != only:
                raise UsageError(f"Setting '{setting}' of {name} is '{value}'. The paper's is '{only}', the only one.")
        one = [setting for setting in ("combine", "one_sided", "x_only", "delta_only") if getattr(self, setting)]
        if len(one) > 1:
            raise UsageError(f"Settings '{one[0]}' and '{one[1]}' of {name} exclude each other. Turn one of them off.")
        for setting in ("cedit", "cloc", "lr_lr"):
            if not 0 <= (value := getattr(self, setting)) < math.inf:
                raise UsageError(f"Setting '{setting}' of {name} is {value}. It has to be a number, 0 or above.")
        if self.rank < 1 or self.n_hidden < 0 or self.rephrases < 0 or self.probes < 1:
            raise UsageError(
                f"Settings 'rank', 'n_hidden', 'rephrases' and 'probes' of {name} are {self.rank}, {self.n_hidden}, "
                f"{self.rephrases} and {self.probes}. They begin at 1, 0, 0 and 1."
            )
        named_once(self.alg_name, self.inner_params)

    def design(self) -> Design:
        """The network."""
        sides = {"x_only": "inputs", "delta_only": "gradients", "one_sided": "smaller", "combine": "both"}
        chosen = next((sides[setting] for setting in sides if getattr(self, setting)), "separate")
        return Design(self.rank, self.n_hidden, chosen, self.norm, self.shared, self.edit_lr)


@dataclass(kw_only=True)
class MENDTrainingHparams(_Mend):
    """Settings of the training of MEND."""

    alg: str = "MEND"  # alg_name under its other name

    def editor(self, lm: LM) -> Trainable:
        """What is trained, on a model."""
        return MENDTraining(lm, self)


@dataclass(kw_only=True)
class MENDHyperParams(_Mend):
    """Settings of MEND."""

    training: ClassVar[type[Trained]] = MENDTrainingHparams

    lr_scale: float = 1.0  # factor of the learned steps
    max_output_length: int | None = None  # kept for existing files


class MENDTraining:
    """MEND as the trainer sees it; see `easyeditor.core.training.Trainable`.

    Args:
        lm: The model, without edits.
        hparams: Complete settings.
    """

    def __init__(self, lm: LM, hparams: MENDTrainingHparams) -> None:
        self.lm, self.hparams = lm, hparams
        self.sites = [lm.site(path) for path in hparams.inner_params]
        self.module = _network(self.sites, hparams.design(), hparams.seed).to(self.sites[-1].weight.device)
        self.before = Before(lm, self.sites, TOKENS, hparams.cache_gb * 2**30, hparams.seed)
        if hparams.archive is not None:
            _load(self.module, self.sites, lm, archive_of(hparams.archive, lm, hparams.alg_name))

    def prepare(self, visits: Sequence[Visit]) -> None:
        """Means and deviations of u and v, over the first requests of the training set."""
        if self.hparams.norm and self.hparams.archive is None:
            found = [self.before.gradient(visit) for visit in visits[:SEEN_BEFORE]]
            self.module.observe(together([[each] for each in found]))

    def parameters(self) -> list[dict[str, Any]]:
        """The network, and the steps with a step size of their own."""
        network = list(self.module.transforms.parameters())
        return [{"params": network}, {"params": [self.module.lrs], "lr": self.hparams.lr_lr}]

    def losses(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """The losses of some edits, (edits,)."""
        known = [[(visit, self.before(visit)) for visit in group] for group in groups]
        changes = self.module(together([[self.before.gradient(visit) for visit in group] for group in groups]))
        rows = drawn(known, self.hparams.seed, self.hparams.rephrases, self.hparams.probes)
        found = rehearsed(self.lm, self.sites, rows, changes, len(groups)).per_edit(len(groups))
        total = self.hparams.cedit * found["loss/edit"] + self.hparams.cloc * found["loss/loc"]
        return {**found, "loss/total_edit": total.detach(), TOTAL: total}

    def edit(self, requests: Sequence[EditRequest]) -> WeightEdit:
        """The edit that the network would make of some requests as it is now."""
        return written(self.module, self.before, requests)

    def header(self) -> dict[str, Any]:
        """The projections, with the fingerprints of their weights."""
        names = [site.weight_name for site in self.sites]
        return {"inner_params": names, "base": base_of(self.lm, names)}


def prepare(lm: LM, hparams: MENDHyperParams, corpus: Any = None) -> dict[str, Any]:
    """The trained network, read from the archive.

    Raises:
        UsageError: No archive is named, or there is none.
        WrongBase: It was trained on another model.
        DamagedFile: It cannot be read.
    """
    archive = archive_of(hparams.archive, lm, hparams.alg_name)
    names = archive.header.get("inner_params") or hparams.inner_params
    said = archive.header.get("settings", {})
    design = MENDHyperParams(**{name: said.get(name, getattr(hparams, name)) for name in ARCHITECTURE}).design()
    sites = [lm.site(path) for path in names]
    network = _network(sites, design, 0).to(sites[-1].weight.device)
    _load(network, sites, lm, archive)
    return {"network": network.requires_grad_(False).eval(), "sites": [site.name for site in sites]}


@method("MEND", hparams=MENDHyperParams, paper="arXiv:2110.11309", requests="many", prepare=prepare)
def mend(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: MENDHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests: the sum of their changes."""
    before = Before(lm, [lm.site(path) for path in state["sites"]], TOKENS, 0.0)
    return written(state["network"], before, requests, hparams.lr_scale)


@torch.no_grad()
def written(network: Hypernetwork, before: Before, requests: Sequence[EditRequest], scale: float = 1.0) -> WeightEdit:
    """The edit that a network makes of some requests.

    Args:
        network: What turns gradients into changes.
        before: What the model says of the requests.
        requests: The requests.
        scale: Factor of the learned steps.
    """
    found = network(together([[before.factors(request) for request in requests]]))
    return WeightEdit(
        deltas={
            name: LowRank((each.gradients * scale).T.float().contiguous(), each.inputs.T.float().contiguous())
            for name, each in found.items()
        }
    )


ARCHITECTURE = ("rank", "n_hidden", "combine", "one_sided", "x_only", "delta_only", "norm", "shared")


def _network(sites: Sequence[Site], design: Design, seed: int) -> Hypernetwork:
    return Hypernetwork({site.weight_name: (site.d_out, site.d_in) for site in sites}, design, seed)


def _load(network: Hypernetwork, sites: Sequence[Site], lm: LM, archive: Archive) -> None:
    """Put what an archive holds into a network that was built for it."""
    tensors = archive.tensors if archive.header else _of_easyedit(archive, network, sites)
    fill(network, tensors, archive, lm)


def _of_easyedit(archive: Archive, network: Hypernetwork, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The tensors of an archive of EasyEdit under the names that they have here; its base cannot be checked."""
    own = archive.tensors
    found = {name: each for name, each in network.state_dict().items() if name.endswith((".scale", ".offset"))}
    for key, names in network.groups.items():
        site = next(each for each in sites if each.weight_name == names[0])
        old = f"mend.({site.d_in}, {site.d_out})" if network.shared else f"mend.{names[0].replace('.', '#')}"
        parts = {name.removeprefix(f"{old}."): each for name, each in own.items() if name.startswith(f"{old}.")}
        for name, tensor in parts.items():
            chain, _, place = name.partition(".layers.")
            layer, _, part = place.partition(".")
            if chain in CHAINS and part in PARTS:
                found[f"transforms.{key}.chains.{CHAINS[chain]}.layers.{layer}.{PARTS[part]}"] = tensor
        if {"k", "u_mean", "v_mean", "u_s", "v_s"} <= set(parts):
            found[f"transforms.{key}.count"] = parts["k"].reshape(()).long()
            found[f"transforms.{key}.mean"] = torch.cat([parts["u_mean"], parts["v_mean"]]).double()
            found[f"transforms.{key}.squares"] = torch.cat([parts["u_s"], parts["v_s"]]).double()
    if "edit_lrs" in own:
        found["lrs"] = -own["edit_lrs"].float()
    return found


CHAINS = MappingProxyType({"mlp": "both", "mlp1": "inputs", "mlp2": "gradients"})
PARTS = MappingProxyType(
    {"u": "u", "v": "v", "bias": "bias", "mode_scale.weight": "scale", "mode_shift.weight": "offset"}
)
