"""Scores of facts on the model as it is, against what the unedited model answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyeditor.bench.before import Before, Scores, answers_key, model_key
from easyeditor.bench.editing import sentence
from easyeditor.bench.plan import Plan
from easyeditor.edits.ledger import Ledger
from easyeditor.lm.model import LM
from easyeditor.metrics.capability import capability
from easyeditor.metrics.perplexity import Perplexity, alarm, perplexity
from easyeditor.metrics.quality import compare_locality, quality
from easyeditor.requests import EditRequest

TEXTS, TEXT_TOKENS = 50, 128  # held-out texts, and how much of each is read

ROWS = 128  # prompts per forward pass


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
        self.wanted = plan.scores
        self._perplexity: Perplexity | None = None
        how = {"max_new_tokens": plan.max_new_tokens, "test_generation": plan.test_generation}
        how |= self.wanted.to_dict()
        self.before = Before(folder, f"before{writer}", answers_key(lm, self.fingerprint, how), self.alone)

    def alone(self, facts: Sequence[EditRequest]) -> list[Scores]:
        """The scores of facts; a fact that cannot be scored says so, and the others are."""
        plan = self.plan
        try:
            return quality(
                self.lm,
                facts,
                max_new_tokens=plan.max_new_tokens,
                batch_size=ROWS,
                test_generation=plan.test_generation,
                seed=0,
                scores=self.wanted,
            )
        except OSError:  # a full disk is no property of the fact
            raise
        except Exception as error:
            if len(facts) == 1:
                return [{"unscored": sentence(error)}]
            return [scores for fact in facts for scores in self.alone([fact])]

    def damage(self) -> dict[str, Any] | None:
        """Perplexity on held-out text without and with the edits that are on the model; None if there is no such thing.

        Returns:
            ``before``, ``after`` and ``alarm``: a sentence if the model reads much worse, else None.
        """
        if self.lm.seq2seq:
            return None
        if self._perplexity is None:
            with Ledger.of(self.lm).suspended():
                self._perplexity = perplexity(self.lm, self.plan.held_out, texts=TEXTS, max_tokens=TEXT_TOKENS)
        after = perplexity(self.lm, self.plan.held_out, texts=TEXTS, max_tokens=TEXT_TOKENS)
        told = alarm(self._perplexity, after)
        return {"before": self._perplexity.to_dict(), "after": after.to_dict(), "alarm": told}

    def capability(self) -> dict[str, Any]:
        """Scores of the plan's tasks with the edits that are on the model; or ``unscored`` and why.

        Raises:
            UsageError: The tasks cannot be had, and there is no edit that could be at fault.
        """
        plan = self.plan
        try:
            return capability(
                self.lm,
                plan.tasks,
                limit=plan.task_limit,
                include_path=plan.tasks_folder,
                packaged=plan.tasks_folder is None,
            )
        except Exception as error:
            if not Ledger.of(self.lm).active:
                raise
            return {"unscored": sentence(error)}

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
