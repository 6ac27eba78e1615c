"""Which scores are computed beside the core ones; all of these cost something and are off unless asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from easyeditor.errors import UsageError
from easyeditor.metrics.judge import Judge

TextScore = Literal["rouge", "bleu", "similarity"]
TEXT_SCORES = ("rouge", "bleu", "similarity")
EVAL_METRICS = (None, "exact match", "token em", "token_em", "ppl", "ood_ppl")
EVALUATION_TYPES = (None, "", "LLM-judge", "generate-text")


@dataclass(frozen=True)
class Scores:
    """What to compute beside exact match, token accuracy, agreement and probability comparisons.

    Args:
        divergence: Locality also as the Jensen-Shannon divergence of the next token, in bits (``<name>_js``).
        robustness: The edited fact under negation, as true or false, and as a cloze (``robustness``).
        prefix: An unrelated text; the edited prompt is also asked behind it (``robustness.behind_text_gen``).
        texts: Scores of a long answer against the whole target: ``rouge``, ``bleu``, ``similarity`` (``text``).
        text_tokens: The longest such answer, in tokens.
        encoder: A sentence-transformers folder, for ``similarity``.
        judge: Who says whether an answer is right (``..._judge``).
        eval_metric: EasyEdit's: ``ppl`` and ``ood_ppl`` add ``rewrite_ppl`` and ``ood_acc`` in place of ``_acc``.
        evaluation_type: EasyEdit's: with ``LLM-judge``, ``_acc`` is the judge's verdict (without a judge, exact match
            of the free answer); with ``generate-text`` there is no ``_acc``.

    Raises:
        UsageError: A name is unknown, or ``similarity`` comes without an encoder.
    """

    divergence: bool = False
    robustness: bool = False
    prefix: str | None = None
    texts: tuple[TextScore, ...] = ()
    text_tokens: int = 256
    encoder: str | None = None
    judge: Judge | None = None
    eval_metric: str | None = None
    evaluation_type: str | None = None

    def __post_init__(self) -> None:
        known = {"eval_metric": EVAL_METRICS, "evaluation_type": EVALUATION_TYPES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                said = ", ".join(f"'{value}'" for value in values if value)
                raise UsageError(f"{name} is '{getattr(self, name)}'. Known: {said}; or leave it out.")
        if odd := [name for name in self.texts if name not in TEXT_SCORES]:
            raise UsageError(f"There is no text score '{odd[0]}'. Known: {', '.join(TEXT_SCORES)}.")
        if "similarity" in self.texts and not self.encoder:
            raise UsageError("The text score 'similarity' needs 'encoder', a sentence-transformers folder.")
        if self.text_tokens < 1:
            raise UsageError(f"text_tokens is {self.text_tokens}; a long answer has at least one token.")

    def to_dict(self) -> dict[str, Any]:
        """The choice in a form that JSON can hold, for a run file or a key; of a judge its name and address."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "texts": list(self.texts), "judge": self.judge and f"{self.judge.name} {self.judge.base_url}"}
