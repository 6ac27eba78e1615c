"""Whether a model still speaks as it did: the alarm of training that went too far."""

from __future__ import annotations

import math
from itertools import islice

import torch

from easyeditor.core.corpus import read_corpus
from easyeditor.core.likelihood import answers, token_log_probs
from easyeditor.edits.delta import Delta, LowRank, dense, from_tensors
from easyeditor.edits.edit import Edit, ModuleEdit, WeightEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.errors import EditFailed
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM

TEXTS, WORDS, TOKENS = 4, 4, 16  # beginnings of bundled texts, and how long the model goes on from each
NEAR, LOST = 0.9, 0.5  # of the nats per token of guessing: where it ends up, and how much worse that is than before


def refuse_ruin(lm: LM, edit: Edit, lr: float) -> None:
    """Refuse an edit after which the model finds what it said before hardly likelier than by guessing.

    What it says of other things is what it goes on with, before, from the beginnings of a few bundled texts. Only a
    change that is larger than a weight itself, or stands beside a quantised one, is tried out.

    Args:
        lm: The model, without the edit.
        edit: The edit.
        lr: The learning rate it was trained with, for the error.

    Raises:
        EditFailed: The model would be ruined.
    """
    if all(_share(lm, name, delta) < 1 for name, delta in _changes(edit).items()):
        return
    said = speech(lm)
    before = unlikeliness(lm, said)
    with applied(lm, edit):
        after = unlikeliness(lm, said)
    guessing = math.log(lm.vocab)
    if not after < max(NEAR * guessing, before + LOST * guessing):  # also where it is no number
        raise EditFailed(
            f"Trained with a learning rate 'lr' of {lr:g}, the model would be ruined: what it says of other things "
            f"would have a perplexity of e^{after:.1f} instead of e^{before:.1f}. It is as it was. Lower 'lr' or the "
            "number of steps."
        )


def speech(lm: LM) -> list[tuple[str, str]]:
    """Beginnings of bundled texts, and how the model goes on from them."""
    begun = [" ".join(text.split()[:WORDS]) for text in islice(read_corpus("texts"), TEXTS)]
    return [(lm.rewrite(text), said) for text, said in zip(begun, answer(lm, begun, TOKENS), strict=True)]


@torch.no_grad()
def unlikeliness(lm: LM, said: list[tuple[str, str]]) -> float:
    """The mean of -log p over the tokens of what was said, ends included."""
    return -float(token_log_probs(lm, answers(lm, said, with_end=bool(lm.text.eos_ids))).mean())


def _changes(edit: Edit) -> dict[str, Delta]:
    """What is added to each weight, or stands beside it."""
    if isinstance(edit, WeightEdit):
        return dict(edit.deltas)
    assert isinstance(edit, ModuleEdit)
    return {f"{name}.weight": from_tensors(wrapper.tensors()) for name, wrapper in edit.wrappers.items()}


def _share(lm: LM, name: str, delta: Delta) -> float:
    """|D| / |W0| of one weight; without bound where the weight is quantised."""
    base = Ledger.of(lm).base(name)
    if isinstance(delta, LowRank):
        square = float(((delta.left.T @ delta.left) * (delta.right.T @ delta.right)).sum())
    else:
        square = float(dense(delta).square().sum())
    size = float(base.float().norm()) if base.is_floating_point() else 0.0
    return max(square, 0.0) ** 0.5 / size if size else math.inf
