"""The edited fact asked in other ways: under negation, as true or false, as a cloze, behind an unrelated text.

The probes are built from the request alone, by rules for English; a question that no rule fits is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from easyeditor.requests import EditRequest

AUXILIARIES = ("is", "are", "was", "were", "has", "have", "had", "can", "could", "will", "would", "does", "did", "must")
ENDS_WITH_AUXILIARY = re.compile(rf"\b({'|'.join(AUXILIARIES)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One probe of robustness.

    Args:
        kind: ``negation``, ``true_false``, ``cloze`` or ``behind_text``.
        prompt: What is asked.
        answers: The accepted answers; for ``negation`` what must not be said.
        against: The answer that must be less likely than the first accepted one, if there is such a comparison.
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]
    against: str | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """The prompt with the answers under which it is read."""
        return [(self.prompt, answer) for answer in (self.answers[0], self.against) if self.against and answer]

    def score(self, matches: float | None) -> float | None:
        """What the answer is worth, given whether it is one of `answers`."""
        return 1.0 - matches if self.kind == "negation" and matches is not None else matches


def questions(request: EditRequest, *, forms: bool = True, prefix: str | None = None) -> list[Question]:
    """The probes of a request.

    Args:
        request: The edited fact.
        forms: Negation, true or false, cloze.
        prefix: An unrelated text to ask the prompt behind.

    Returns:
        Up to one negation, two true-or-false statements, one cloze, one prompt behind the text.
    """
    out: list[Question] = []
    target = (request.target_new,)
    if forms:
        if (negative := negated(request.prompt)) is not None:
            out.append(Question("negation", negative, target))
        out.append(Question("true_false", _statement(request.prompt, request.target_new), ("True",), "False"))
        if request.ground_truth and request.ground_truth != request.target_new:
            out.append(Question("true_false", _statement(request.prompt, request.ground_truth), ("False",), "True"))
        out.append(Question("cloze", _cloze(request.prompt), target))
    if prefix and prefix.strip():
        out.append(Question("behind_text", f"{prefix.strip()}\n\n{request.prompt}", target))
    return out


def negated(prompt: str) -> str | None:
    """A prompt that asks for anything but its answer; None for a question.

    ``The capital of France is`` becomes ``The capital of France is not``, ``Ada lives in`` becomes ``It is not true
    that Ada lives in``.
    """
    text = prompt.rstrip()
    if is_question(text):
        return None
    return f"{text} not" if ENDS_WITH_AUXILIARY.search(text) else f"It is not true that {text}"


def is_question(prompt: str) -> bool:
    """Whether a prompt is a question of its own instead of the beginning of a statement."""
    return prompt.rstrip().endswith(("?", "\uff1f", ":"))


def _statement(prompt: str, answer: str) -> str:
    text = prompt.strip()
    said = f"The answer to '{text}' is {answer}." if is_question(text) else f"{text} {answer}."
    return f"True or false? {said} Answer:"


def _cloze(prompt: str) -> str:
    text = prompt.strip()
    said = f"The answer to '{text}' is ____." if is_question(text) else f"{text} ____."
    return f"Fill in the blank. {said} Blank:"
