"""MALMEN: Massive Editing for Large Language Models via Meta Learning. Tan et al., ICLR 2024. arXiv:2311.04661.

Idea      A network, trained once per model, says of each token how what a projection returns should move. One change of
          the weight does that for the tokens of thousands of facts as well as any can.
Equation  d = -lr (k^T k~) g~ with [k~, g~] = g([k, g]), blocks z + s ReLU(z A B + b) + o;
          Delta = D K^T (K K^T + e^lambda I)^-1; trained on -log p'(new answer) + loc_coef KL(p || p')(probes)
Changes   Each projection of `inner_params`, by as many ranks as there are tokens, at most its whole weight.
Needs     Prompt and answer, and an archive that `easyedit train` wrote for this model.
Relations UltraEdit is its network before any training, with statistics of the edits. MEND adds changes up. RLEdit
          trains the same network over a sequence of edits.
Deviates  Keys and gradients are normalised by means and deviations taken over the training set before the first step.
          Tokens that the loss does not depend on have no part. The new answer is learnt on the prompt too, not in
          other wordings only, and what follows it is kept from moving. Each fact weighs the same, however many go
          through the model at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.archive import Archive, base_of
from easyeditor.core.gradients import TOKENS, Factors
from easyeditor.core.massive import Lessons, carried, tokens_of
from easyeditor.core.rehearsal import Before, together
from easyeditor.core.restored import archive_of, fill
from easyeditor.core.shifts import ShiftNetwork, Sums, in_parts
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained, named_once
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import method
from easyeditor.requests import EditRequest

SEEN_BEFORE = 1000  # requests of the training set that means and deviations are taken over


@dataclass(kw_only=True)
class Malmen(Trained):
    """What the network looks like and what it learns; the archive holds to it afterwards."""

    alg_name: str = "MALMEN"
    inner_params: list[str] = field(default_factory=list)  # the projections; empty: preset row, else by depth
    rank: int = 1920  # of the blocks, at most their width
    n_blocks: int = 2  # of the network
    lr: float = 1e-6  # where the learned steps of the moves begin
    meta_lr: float = 1e-5  # the step size of what is trained
    lr_lr: float | None = None  # that of the learned steps; None: meta_lr
    loc_coef: float = 1.0  # weight of the divergence on what must not move
    max_grad_norm: float = 1.0  # the largest norm of a gradient
    token: str = "ans"  # 'ans': tokens that predict an answer token; 'mask': all tokens
    n_edits: int = 512  # facts that are edited together in training
    batch_size: int = 512  # facts per edit
    val_batch_size: int = 512  # facts that are edited together in validation
    batch_size_once: int = 32  # facts per pass of the model; the result does not depend on it
    editor_batch_size: int = 1024  # tokens that pass the network at a time; the result does not depend on it
    n_asked: int | None = None  # facts of a batch that a step of the training looks at, drawn anew; None: all of them
    accumulate_bs: int = 1  # batches per step of the optimiser, over all processes
    rephrases: int = 1  # other wordings of a fact that the new answer is learnt on, per visit
    probes: int = 1  # probes of a fact that are kept from moving, per visit
    cache_dir: str | None = None  # kept for existing files; nothing is kept, and cache_gb is not read
    grad_clip: float = 1.0  # kept for existing files; max_grad_norm says it

    def check(self) -> None:
        """A network that exists, and sizes that mean something."""
        super().check()
        name = self.alg_name
        if self.token not in TOKENS:
            raise UsageError(f"Setting 'token' of {name} is '{self.token}'. Choose {' or '.join(TOKENS)}.")
        for setting in ("rank", "n_blocks", "n_edits", "n_asked", "editor_batch_size", "probes"):
            if (value := getattr(self, setting)) is not None and value < 1:
                raise UsageError(f"Setting '{setting}' of {name} is {value}. It has to be a number from 1 on.")
        for setting in ("meta_lr", "max_grad_norm", "lr_lr"):
            if (value := getattr(self, setting)) is not None and not 0 < value < math.inf:
                raise UsageError(f"Setting '{setting}' of {name} is {value}. It has to be a number above 0.")
        if not 0 <= self.loc_coef < math.inf or self.rephrases < 0:
            raise UsageError(
                f"Settings 'loc_coef' and 'rephrases' of {name} are {self.loc_coef} and {self.rephrases}. Both begin "
                "at 0."
            )
        named_once(self.alg_name, self.inner_params)

    @property
    def per_batch(self) -> int:
        """Facts of one batch of the training."""
        return self.n_edits

    @property
    def largest_norm(self) -> float:
        """What gradients are clipped to."""
        return self.max_grad_norm


@dataclass(kw_only=True)
class MALMENTrainingHparams(Malmen):
    """Settings of the training of MALMEN."""

    alg: str = "MALMEN"  # alg_name under its other name

    def editor(self, lm: LM) -> Trainable:
        """What is trained, on a model."""
        return MALMENTraining(lm, self)


@dataclass(kw_only=True)
class MALMENHyperParams(Malmen):
    """Settings of MALMEN."""

    training: ClassVar[type[Trained]] = MALMENTrainingHparams


class MALMENTraining:
    """MALMEN as the trainer sees it; see `easyeditor.core.training.Trainable`.

    Args:
        lm: The model, without edits.
        hparams: Complete settings.
    """

    def __init__(self, lm: LM, hparams: Malmen) -> None:
        self.lm, self.hparams = lm, hparams
        self.sites = [lm.site(path) for path in hparams.inner_params]
        self.module = _network(self.sites, hparams, hparams.seed)
        self.before = Before(lm, self.sites, hparams.token, room=0.0, seed=hparams.seed)
        self.lessons = Lessons(
            self.before,
            wordings=hparams.rephrases,
            probes=hparams.probes,
            loc=hparams.loc_coef,
            at_once=hparams.batch_size_once,
        )
        if hparams.archive is not None:
            _restore(self.module, self.sites, archive_of(hparams.archive, lm, hparams.alg_name), lm)

    def prepare(self, visits: Sequence[Visit]) -> None:
        """Means and deviations of keys and gradients, over the first requests of the training set."""
        if self.hparams.archive is None:
            self.module.observe(self.tokens(visits[:SEEN_BEFORE]))

    def parameters(self) -> list[dict[str, Any]]:
        """The network, and the steps with a step size of their own."""
        step, own = self.hparams.meta_lr, self.hparams.lr_lr
        network = [*self.module.transforms.parameters(), self.module.lamda]
        return [{"params": network, "lr": step}, {"params": [self.module.lrs], "lr": own if own is not None else step}]

    def losses(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """The losses of some batches, (batches,)."""
        found = [self._batch(group) for group in groups]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def tokens(self, visits: Sequence[Visit]) -> dict[str, Factors]:
        """Weight name -> the tokens of some facts, on the model as it is."""
        requests = [visit.request for visit in visits]
        parts = tokens_of(self.lm, self.sites, requests, self.hparams.token, self.hparams.batch_size_once)
        return together([list(parts)])

    def _batch(self, group: Sequence[Visit]) -> dict[str, Tensor]:
        """The losses of one batch."""
        tokens = self.tokens(group)
        changes = {name: self.module.change(name, tokens[name], self.hparams.editor_batch_size) for name in tokens}
        means, gradients = self.lessons(self._asked(group), group, changes)
        return {**means, TOTAL: means[TOTAL] + carried(changes, gradients)}

    def _asked(self, group: Sequence[Visit]) -> Sequence[Visit]:
        """The facts that the loss is taken over; in validation all."""
        most = self.hparams.n_asked
        if most is None or most >= len(group) or group[0].epoch is None:
            return group
        return group[0].drawing(self.hparams.seed).sample(list(group), most)

    def header(self) -> dict[str, Any]:
        """The projections, with the fingerprints of their weights."""
        names = [site.weight_name for site in self.sites]
        return {"inner_params": names, "base": base_of(self.lm, names)}


def prepare(lm: LM, hparams: Malmen, corpus: Any = None) -> dict[str, Any]:
    """The trained network, read from the archive.

    Raises:
        UsageError: No archive is named, or there is none.
        WrongBase: It was trained on another model.
        DamagedFile: It cannot be read.
    """
    archive = archive_of(hparams.archive, lm, hparams.alg_name)
    said = archive.header.get("settings", {})
    sites = [lm.site(path) for path in archive.header.get("inner_params") or hparams.inner_params]
    built = MALMENHyperParams(**{name: said.get(name, getattr(hparams, name)) for name in ("rank", "n_blocks")})
    network = _network(sites, built, 0)
    _restore(network, sites, archive, lm)
    token = said.get("token", hparams.token)
    return {"network": network.requires_grad_(False).eval(), "sites": [site.name for site in sites], "token": token}


@method("MALMEN", hparams=MALMENHyperParams, paper="arXiv:2311.04661", requests="many", prepare=prepare)
def malmen(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: Malmen,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests; what is held does not grow with their number."""
    sites, network = [lm.site(path) for path in state["sites"]], state["network"]
    sums = {site.weight_name: Sums(site.d_in) for site in sites}
    for found in tokens_of(lm, sites, requests, state["token"], hparams.batch_size_once):
        for name, tokens in found.items():
            for keys, gradients in in_parts(tokens, hparams.editor_batch_size):
                sums[name].add(keys, network.moves(name, keys, gradients))
    return WeightEdit(deltas={name: each.change(float(network.alpha(name))) for name, each in sums.items()})


def _network(sites: Sequence[Site], hparams: Malmen, seed: int) -> ShiftNetwork:
    shapes = {site.weight_name: (site.d_out, site.d_in) for site in sites}
    return ShiftNetwork(shapes, hparams.rank, hparams.n_blocks, hparams.lr, seed).to(sites[-1].weight.device)


def _restore(network: ShiftNetwork, sites: Sequence[Site], archive: Archive, lm: LM) -> None:
    tensors = archive.tensors if archive.header else _of_easyedit(archive, network, sites)
    fill(network, tensors, archive, lm)


def _of_easyedit(archive: Archive, network: ShiftNetwork, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The tensors of an archive of EasyEdit under the names that they have here; its base cannot be checked."""
    own = {name.partition("(")[1] + name.partition("(")[2]: each for name, each in archive.tensors.items()}
    found: dict[str, Tensor] = {}
    lrs, lamda = torch.zeros(len(network.names)), torch.zeros(len(network.names))
    for key, names in network.groups.items():
        site = next(each for each in sites if each.weight_name == names[0])
        old = f"({site.d_in}, {site.d_out})."
        parts = {name.removeprefix(old): each for name, each in own.items() if name.startswith(old)}
        for name, tensor in parts.items():
            if name.startswith("blocks."):
                found[f"transforms.{key}.{name.removesuffix('.weight')}"] = tensor
        if {"normalizer.n", "normalizer.mean", "normalizer.var", "lr.weight", "lamda.weight"} <= set(parts):
            found[f"transforms.{key}.count"] = parts["normalizer.n"].reshape(()).long()
            found[f"transforms.{key}.mean"] = parts["normalizer.mean"].double()
            found[f"transforms.{key}.squares"] = parts["normalizer.var"].double()
            at = [network.names.index(name) for name in names]
            lrs[at], lamda[at] = parts["lr.weight"].float().flatten(), parts["lamda.weight"].float().flatten()
    return {**found, "lrs": lrs, "lamda": lamda} if found else {}
