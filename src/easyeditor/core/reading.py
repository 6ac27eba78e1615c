"""Whether an edit leaves a model that still reads: the alarm of training that went too far."""

from __future__ import annotations

import math

import torch

from easyeditor.core.corpus import read_corpus
from easyeditor.core.likelihood import answers, token_log_probs
from easyeditor.edits.delta import LowRank, dense
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.errors import EditFailed
from easyeditor.lm.model import LM

LETTERS, WORDS = 300, 3  # of the text that is read, and how many of its words are given
WORSE = math.log(10)  # how much worse than the model before, and than guessing, in nats per token


def refuse_ruin(lm: LM, edit: Edit, lr: float) -> None:
    """Refuse an edit after which the model reads ordinary text worse than by guessing.

    Only a change that is larger than a weight itself is tried out; a smaller one does not do that.

    Args:
        lm: The model, without the edit.
        edit: The edit.
        lr: The learning rate it was trained with, for the error.

    Raises:
        EditFailed: The model would be ruined.
    """
    if isinstance(edit, WeightEdit) and all(_share(lm, edit, name) < 1 for name in edit.deltas):
        return
    before = unlikeliness(lm)
    with applied(lm, edit):
        after = unlikeliness(lm)
    bound = max(before, math.log(lm.vocab)) + WORSE
    if not after < bound:  # also where it is no number
        raise EditFailed(
            f"Trained with a learning rate 'lr' of {lr:g}, the model would read ordinary text with a perplexity of "
            f"e^{after:.1f} instead of e^{before:.1f}, worse than by guessing; it is as it was. Lower 'lr' or the "
            "number of steps."
        )


@torch.no_grad()
def unlikeliness(lm: LM) -> float:
    """The mean of -log p over the tokens of a bundled text."""
    words = next(iter(read_corpus("texts")))[:LETTERS].split()
    batch = answers(lm, [(" ".join(words[:WORDS]), " ".join(words[WORDS:]))])
    return -float(token_log_probs(lm, batch).mean())


def _share(lm: LM, edit: WeightEdit, name: str) -> float:
    """|D| / |W0| of one weight."""
    delta, base = edit.deltas[name], Ledger.of(lm).base(name)
    if isinstance(delta, LowRank):
        square = float(((delta.left.T @ delta.left) * (delta.right.T @ delta.right)).sum())
    else:
        square = float(dense(delta).square().sum())
    size = float(base.float().norm())
    return max(square, 0.0) ** 0.5 / size if size else math.inf
