"""Perplexity on held-out text, as an alarm for a model that has collapsed; never clipped.

The mean over texts says nothing once one text explodes, so the median and the 95th percentile are given. Yang et al.,
"The Butterfly Effect of Model Editing", 2024, arXiv:2402.09656.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from easyeditor.core.corpus import read_corpus
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.errors import UsageError
from easyeditor.lm.model import LM
from easyeditor.metrics.likelihood import read_texts

Texts = Iterable[str] | str | Path
PROSE, TABLE = "texts", "tinyfacts"  # bundled


@dataclass(frozen=True)
class Perplexity:
    """Perplexity per text, and what is said of all.

    Args:
        texts: exp(mean negative log-likelihood per token) of each text; None where it is not a finite number or the
            text has fewer than two tokens.
        broken: How many texts got a likelihood that is not a finite number.
        max_tokens: How many tokens of a text were read, at most.
    """

    texts: tuple[float | None, ...]
    broken: int
    max_tokens: int

    @property
    def scored(self) -> list[float]:
        """The values there are."""
        return [value for value in self.texts if value is not None]

    def to_dict(self) -> dict[str, Any]:
        """``median``, ``p95``, ``n``, ``unscored``, ``broken`` and the protocol, for a record."""
        found = self.scored
        return {
            "median": float(np.median(found)) if found else None,
            "p95": float(np.percentile(found, 95)) if found else None,
            "n": len(found),
            "unscored": len(self.texts) - len(found),
            "broken": self.broken,
            "protocol": f"held_out_perplexity.first_{self.max_tokens}_tokens.per_text",
        }


def perplexity(
    lm: LM, source: Texts | None = None, *, texts: int = 100, max_tokens: int = 256, batch_size: int = 8
) -> Perplexity:
    """The perplexity of held-out texts, one by one.

    Args:
        lm: The model with whatever edits are on it.
        source: Texts, a text or JSONL file, or the name of a bundled one: ``texts`` (prose) or ``tinyfacts`` (facts of
            the bundled table's tuning half, in wordings that the bundled model was not trained on); None: `fitting`.
        texts: At most this many of them, from the first on.
        max_tokens: At most this many tokens of each.
        batch_size: Texts per forward pass; it does not change the result.

    Raises:
        UsageError: There is no such source, no text in it, or the model is an encoder-decoder.
    """
    source = fitting(lm.name) if source is None else source
    found = list(islice(_texts(source), texts))
    if not found:
        raise UsageError(f"There is no text in '{source}'. Give one text per line, or an iterable of texts.")
    out = [exp_mean_nll(row) for row in read_texts(lm, found, max_tokens, batch_size)]
    broken = sum(value is None and len(lm.text.encode(text).ids) > 1 for value, text in zip(out, found, strict=True))
    return Perplexity(tuple(out), broken, max_tokens)


def fitting(model: str) -> str:
    """The bundled text that says something of a model: of the bundled model, what it could know; else prose.

    Args:
        model: Its name.
    """
    return TABLE if model == TABLE else PROSE


def _texts(source: Texts) -> Iterable[str]:
    """Texts that no model was trained on here; of the bundled table's corpus, which one was, the held-out sentences."""
    return TinyFacts().held_out_sentences() if source == TABLE else read_corpus(source)


def alarm(before: Perplexity, after: Perplexity, ratio: float = 1.5) -> str | None:
    """A sentence if an edited model reads held-out text much worse, else None.

    Args:
        before: Of the pristine model.
        after: Of the edited one, on the same texts.
        ratio: From which growth of the median or the 95th percentile on.
    """
    old, new = before.to_dict(), after.to_dict()
    if after.broken > before.broken:
        return f"Held-out text: {after.broken} of {len(after.texts)} texts have no finite likelihood after the edits."
    for name, said in (("median", "median"), ("p95", "95th percentile")):
        if old[name] and new[name] and new[name] > ratio * old[name]:
            return (
                f"Held-out perplexity, {said}: {old[name]:.4g} before, {new[name]:.4g} after the edits "
                f"({new[name] / old[name]:.3g} times). The model may have collapsed; take edits back."
            )
    return None


def exp_mean_nll(log_probs: Sequence[float]) -> float | None:
    """Perplexity: exp of the mean negative log-probability, or None where there is no such number."""
    if not log_probs:
        return None
    try:
        value = math.exp(-sum(log_probs) / len(log_probs))
    except OverflowError:
        return None
    return value if math.isfinite(value) else None
