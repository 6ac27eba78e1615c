"""Scores of facts on the model as it is, against what the unedited model answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from easyeditor.bench.before import Before, Scores, answers_key, model_key
from easyeditor.bench.editing import sentence
from easyeditor.bench.plan import Plan
from easyeditor.lm.model import LM
from easyeditor.metrics.quality import compare_locality, quality
from easyeditor.requests import EditRequest


class Scoring:
    """Scores facts as a plan says.

    Args:
        plan: The run.
        lm: The model; without edits when this is built.
        folder: Of the run.
        writer: Ends the name of the file of new answers.

    Attributes:
        fingerprint: Of the model.
        before: What it answers without edits.
    """

    def __init__(self, plan: Plan, lm: LM, folder: Path, writer: str = "") -> None:
        self.plan, self.lm = plan, lm
        self.fingerprint = model_key(lm)
        how = {"max_new_tokens": plan.max_new_tokens, "test_generation": plan.test_generation}
        self.before = Before(folder, f"before{writer}", answers_key(lm, self.fingerprint, how), self.alone)

    def alone(self, facts: Sequence[EditRequest]) -> list[Scores]:
        """The scores of facts; a fact that cannot be scored says so, and the others are."""
        plan = self.plan
        try:
            return quality(
                self.lm, facts, max_new_tokens=plan.max_new_tokens, test_generation=plan.test_generation, seed=0
            )
        except OSError:  # a full disk is no property of the fact
            raise
        except Exception as error:
            if len(facts) == 1:
                return [{"unscored": sentence(error)}]
            return [scores for fact in facts for scores in self.alone([fact])]

    def compared(self, facts: Sequence[EditRequest], before: Sequence[Scores]) -> list[Scores]:
        """The scores of facts, with how far their locality probes agree with the scores before."""
        return [self.against(old, new) for old, new in zip(before, self.alone(facts), strict=True)]

    def against(self, before: Scores, after: Scores) -> Scores:
        """Scores with how far their locality probes agree with those before."""
        if "unscored" in before or "unscored" in after:
            return after
        after = {**after, "locality": dict(after["locality"]), "metric_meta": dict(after["metric_meta"])}
        compare_locality(self.lm, before, after)
        return after
