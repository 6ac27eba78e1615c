"""Whether a freely generated answer is the right one. Only texts are compared; the answer was made without them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]")


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and repeated space."""
    return " ".join(ARTICLES.sub(" ", text.casefold().translate(PUNCTUATION)).split())


def readings(generated: str) -> Iterator[str]:
    """What may be the answer in a generated text: its first line, up to any end of a sentence in it.

    'St. Louis. It lies' may mean 'St', 'St. Louis' or all of it; a full stop does not say which.
    """
    line = generated.strip().split("\n")[0]
    for match in SENTENCE_END.finditer(line):
        yield line[: match.start()]
    yield line


def exact_match(generated: str, answers: Iterable[str]) -> float | None:
    """1.0 if a generated answer is one of the accepted ones after `normalise`, else 0.0; None without an answer.

    Args:
        generated: What the model said.
        answers: The accepted answers.
    """
    accepted = {normalise(answer) for answer in answers} - {""}
    if not accepted:
        return None
    return float(any(normalise(reading) in accepted for reading in readings(generated)))


def token_f1(said: Sequence[int], target: Sequence[int]) -> float | None:
    """Macro F1 of tokens, place by place, as EasyEdit gives it for GRACE: the mean of F1 over the tokens that occur.

    Args:
        said: The tokens of an answer; cut where the target ends, and wrong where it is shorter.
        target: Those of the target.

    Returns:
        Between 0 and 1; None without a target.
    """
    if not target:
        return None
    given = [*said[: len(target)], *[None] * (len(target) - len(said))]
    pairs = list(zip(given, target, strict=True))
    each = []
    for kind in {*given, *target}:
        hits = sum(a == b == kind for a, b in pairs)
        each.append(2 * hits / sum((a == kind) + (b == kind) for a, b in pairs))
    return sum(each) / len(each)


def same_text(a: str, b: str) -> float:
    """1.0 if two generated answers agree after `normalise`, else 0.0."""
    return float(normalise(a) == normalise(b))
