"""SERAC: Memory-Based Model Editing at Scale. Mitchell et al., ICML 2022.

arXiv:2206.06520

Idea      The model stays as it is. Facts go into a memory; a classifier, trained once, says which fact a prompt is
          about, and a small counterfactual model, trained once, says what follows if that fact is so.
Equation  p'(y | x) = s p_cf(y | x, z) + (1 - s) p(y | x) for the fact z of the memory that is most like x, with
          s = exp(-|e(z) - e(x)|^2), or s read off z and x together (`cross_attend`); a hard switch at s > 0.5 unless
          `soft_weighting`. Trained on  cedit (-log p_cf(new answer | z)) + cloc (-log s in scope - log(1 - s) outside),
          each on its own (`supervised`), or on the loss and the divergence of the mixture.
Changes   No weight; what the model says is mixed with what a small one says.
Needs     Prompt and answer, and an archive that `easyedit train` wrote for this model.
Relations SCR puts the fact in front of the prompt instead of asking a second model. GRACE decides by states, per token.
Deviates  Whether a fact is about a text is asked at every token, of the text up to there, and stays so: nobody has to
          tell where a prompt ends, and padding, batches and a KV cache change nothing. The authors classify the text of
          a pass as a whole, with the answer where there is one. Without `cls_name` and `small_name` both networks are
          small decoders over the model's own embeddings, and the second may point at tokens of the fact's answer; the
          authors fine-tune a BERT and a small model of the same family. A fact is compared by its prompt alone. Of two
          facts with one prompt the newer holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyeditor.core.archive import base_of
from easyeditor.core.counterfactual import TINY, Question
from easyeditor.core.deputy import Facts
from easyeditor.core.folders import described, learnt
from easyeditor.core.likelihood import answer_logits
from easyeditor.core.restored import archive_of
from easyeditor.core.scope_classifier import FEW, HALF
from easyeditor.core.scope_texts import Texts, drawn, mean_of
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.edits.edit import Edit, ModuleEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class _Serac(Trained):
    """What the networks look like and how they learn; the archive holds to it afterwards."""

    alg_name: str = "SERAC"
    lr: float = 1e-5  # the step size
    cls_name: str | None = None  # a folder with the encoder of the classifier; null: a small decoder
    small_name: str | None = None  # a folder with a small model of the same tokens; null: a small decoder that points
    width: int = 64  # of the small decoders
    n_blocks: int = 2  # of the small decoders
    cross_attend: bool = False  # the classifier reads fact and text together; otherwise it compares vectors
    cos: bool = False  # the distance of vectors is one minus their cosine
    square: bool = True  # the distance of vectors is squared
    bound_embeds: bool = False  # the numbers of the vectors are kept between -1 and 1
    dist_heads: int = 1  # parts of the vectors, of which the nearest count
    soft_weighting: bool = False  # mix the probabilities; otherwise a hard switch at 0.5
    supervised: bool = True  # each network learns its own task; otherwise both learn from what the mixture says
    use_all_negatives: bool = False  # all texts of a batch that are not about a fact count against it, not its own only
    cedit: float = 0.1  # weight of the new answer's loss
    cloc: float = 1.0  # weight of the classifier's loss, or of the divergence on what must not move
    rephrases: int = 1  # other wordings of a fact that are learnt, per visit
    probes: int = 1  # probes of a fact that are learnt to be outside, per visit
    freeze: int | None = None  # train only so many of the last blocks of the encoder of cls_name
    checkpoint_grad: bool = False  # compute the states of the models of folders again instead of keeping them
    max_length: int = 40  # tokens up to a place that the encoder of cls_name reads
    freeze_cntr: bool = False  # the model itself in place of the counterfactual one; see `check`
    lora: Any = None  # kept for existing files
    edit_bs: int = 1  # kept for existing files; batch_size counts the facts
    log_errors: bool = False  # kept for existing files
    unlikelihood: bool = True  # kept for existing files; of the authors' task about opinions alone
    exact_match: bool = False  # kept for existing files; an answer is right when all its tokens are
    cls_class: str | None = None  # kept for existing files; the folder tells
    inner_params: list[str] = field(default_factory=list)  # kept for existing files; no weight is edited
    edit_lr: float = 1e-2  # kept for existing files
    lr_lr: float = 0.0  # kept for existing files
    cbase: float = 1.0  # kept for existing files; the model itself is never trained

    def check(self) -> None:
        """Networks that exist, and weights that mean something."""
        super().check()
        for setting in ("cedit", "cloc"):
            if not 0 <= (value := getattr(self, setting)) < math.inf:
                raise UsageError(f"Setting '{setting}' of SERAC is {value}. It has to be a number, 0 or above.")
        for setting in ("width", "n_blocks", "dist_heads", "probes", "max_length"):
            if (value := getattr(self, setting)) < 1:
                raise UsageError(f"Setting '{setting}' of SERAC is {value}. It has to be a number from 1 on.")
        if self.rephrases < 0 or (self.freeze or 0) < 0:
            raise UsageError("Settings 'rephrases' and 'freeze' of SERAC begin at 0. Give such numbers.")
        if self.cls_name is None and self.width % self.dist_heads:
            raise UsageError(
                f"Setting 'dist_heads' of SERAC is {self.dist_heads}, which does not divide width, {self.width}."
                " Choose one that does."
            )
        if self.freeze_cntr:
            raise UsageError(
                "Setting 'freeze_cntr' of SERAC is true: the model itself would answer with the fact in front of the "
                "prompt. That is method SCR; use it, or drop the setting."
            )
        if self.lora:
            raise UsageError("Setting 'lora' of SERAC is given, but no published code reads it. Drop it.")


@dataclass(kw_only=True)
class SERACTrainingHparams(_Serac):
    """Settings of the training of SERAC."""

    alg: str = "SERAC"  # alg_name under its other name

    def editor(self, lm: LM) -> Trainable:
        """What is trained, on a model."""
        return SERACTraining(lm, self)


@dataclass(kw_only=True)
class SERACHyperParams(_Serac):
    """Settings of SERAC."""

    training: ClassVar[type[Trained]] = SERACTrainingHparams


SERACHparams = SERACHyperParams


class SERACTraining:
    """SERAC as the trainer sees it; see `easyeditor.core.training.Trainable`.

    Args:
        lm: The model, without edits.
        hparams: Complete settings.
    """

    def __init__(self, lm: LM, hparams: SERACTrainingHparams) -> None:
        self.lm, self.hparams = lm, hparams
        if hparams.archive is None:
            self.spec, self.module = described(lm, hparams)
        else:
            self.spec, self.module = learnt(archive_of(hparams.archive, lm, "SERAC"), lm, hparams)
        self.module.to(lm.device).requires_grad_(True)
        self.module.scope.freeze(hparams.freeze)
        if hparams.checkpoint_grad:
            self.module.checkpointed()

    def prepare(self, visits: Sequence[Visit]) -> None:
        """Nothing is needed before the first step."""

    def parameters(self) -> list[dict[str, Any]]:
        """Both networks."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def losses(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """The losses of some edits, (edits,)."""
        found = [self._of_one(group) for group in groups]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def header(self) -> dict[str, Any]:
        """What the networks look like, with the fingerprint of the embeddings that they read."""
        table = self.lm.model.get_input_embeddings().weight  # type: ignore[operator]
        name = next(name for name, weight in self.lm.model.named_parameters() if weight is table)
        return {"spec": self.spec, "base": base_of(self.lm, [name])}

    def _of_one(self, group: Sequence[Visit]) -> dict[str, Tensor]:
        """The losses of the facts of one edit."""
        texts = drawn(self.lm, group, self.hparams.seed, self.hparams.rephrases, self.hparams.probes)
        ends, most = texts.alike(self.lm, self.module.scope)
        about = texts.about()
        scope = -ends[about].mean()
        for outside in texts.outside(self.hparams.use_all_negatives):
            scope = scope - (1 - most[outside].exp()).clamp(min=FEW).log().sum() / outside.sum().clamp(min=1)
        if self.hparams.supervised:
            said, loc = self._said(texts.questions(texts.wanted, texts.owner)), scope
        else:
            said, loc = self._mixed(texts, ends, most)
        rows, labels = texts.told()
        loss = mean_of(-said.gather(1, labels[:, None]).squeeze(1), rows)
        right = mean_of((said.argmax(1) == labels).float(), rows) == 1
        best = ends[texts.wanted].max(1)
        inside = (best.values > math.log(HALF)) & (best.indices == texts.owner[texts.wanted])
        total = self.hparams.cedit * loss.mean() + self.hparams.cloc * loc
        return {
            "loss/edit": loss.mean(),
            "loss/loc": loc,
            "edit/acc": (right & inside).float().mean(),
            "edit/prob": (-loss.detach()).exp().mean(),
            "edit/in_scope": inside.float().mean(),
            "loc/acc": (most[~texts.wanted].amax(1) <= math.log(HALF)).float().mean(),
            "loss/total_edit": total.detach(),
            TOTAL: total,
        }

    def _said(self, questions: Sequence[Question]) -> Tensor:
        """What the counterfactual model says, (tokens, vocab)."""
        said: Tensor = self.module.counterfactual(self.lm, questions)
        return said

    def _mixed(self, texts: Texts, ends: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """What the mixture says at the new answers, (tokens, vocab), and how far it is from the model at the probes."""
        share, fact = torch.where(texts.wanted[:, None], ends, most).max(1)
        rows = texts.asked.batch.rows
        with torch.no_grad(), self.lm.frozen():
            own = answer_logits(self.lm, texts.asked.batch).float().log_softmax(-1)
        weight = share.exp()[rows, None]
        other = self._said(texts.questions(torch.ones_like(texts.wanted), fact))
        mixed = (weight * other.exp() + (1 - weight) * own.exp() + TINY).log()
        wanted = texts.wanted[rows]
        kl = (own.exp() * (own - mixed)).sum(1)[~wanted]
        return mixed[wanted], mean_of(kl, rows[~wanted]).mean()


def prepare(lm: LM, hparams: SERACHyperParams, corpus: Any = None) -> dict[str, Any]:
    """The trained networks, read from the archive.

    Raises:
        UsageError: No archive is named, or there is none.
        WrongBase: It was trained on another model.
        DamagedFile: It cannot be read.
    """
    spec, module = learnt(archive_of(hparams.archive, lm, "SERAC"), lm, hparams)
    return {"spec": spec, "weights": {name: tensor.detach() for name, tensor in module.state_dict().items()}}


@method(
    "SERAC",
    hparams=SERACHyperParams,
    paper="arXiv:2206.06520",
    requests="many",
    kind="module",
    prepare=prepare,
    wrapper=Facts,
)
def serac(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: SERACHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> ModuleEdit:
    """Some facts for the memory."""
    facts = [(lm.text.render(request.prompt), request.target_new) for request in requests]
    head = next(name for name, module in lm.model.named_modules() if module is lm.head)
    return ModuleEdit(
        wrappers={lm.site(head).name: Facts(facts, hparams.soft_weighting, state["spec"], state["weights"])}
    )
