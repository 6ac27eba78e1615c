"""`PerEditor`: a model takes on a personality's opinion on a topic. Mao et al., 2023, arXiv:2310.02168."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.editors.base import Records
from easyeditor.editors.scenario import ScenarioEditor
from easyeditor.edits.edit import Edit
from easyeditor.errors import UsageError
from easyeditor.evaluate.personality_evaluate import TEXT, per_generation
from easyeditor.metrics.opinions import Opinions, opinion_scores
from easyeditor.requests import EditRequest

SIDES = ("cond_prompt", "cond_comp", "target_per", "target_personality", "all_prompt", "all_comp", "all_per", "ent")


class PerEditor(ScenarioEditor):
    """Edits opinions on topics and asks how far they turned, and whether opinions on other topics moved."""

    def edit_dataset(
        self, ds: Sequence[Mapping[str, Any]], keep_original_weight: bool = False, verbose: bool = True
    ) -> tuple[Records, Any, list[Edit]]:
        """Edit the records of a data set, each on the model as it was, and measure them.

        Args:
            ds: A `PersonalityDataset`, or items as it has them.
            keep_original_weight: Makes no difference: a model is never left with more than the last single edit.
            verbose: Whether to log each record.

        Returns:
            Flat records with ``case_id``, ``time``, ``es`` and ``dd`` (see `easyeditor.metrics.opinions`; ``dd`` is
            over the opinions on the next topic, None without one), and what `per_generation` says: ``pre_text``,
            ``edit_text``, their entropies, ``coherent``, ``target_per``. The model; the edits.

        Raises:
            UsageError: An item lacks a field.
        """
        items = [ds[i] for i in range(len(ds))]
        for i, item in enumerate(items):
            if missing := [name for name in SIDES if name not in item]:
                raise UsageError(f"Record {i}, field '{missing[0]}': it is missing. Pass a PersonalityDataset.")
        built = getattr(ds, "requests", None)
        fields = {"prompt": "cond_prompt", "target_new": "cond_comp", "subject": "ent"}
        found: list[EditRequest] = (
            built()
            if built is not None
            else [EditRequest.from_dict({new: item[old] for new, old in fields.items()}) for item in items]
        )
        asked = [opinions_of(items, i) for i in range(len(items))]

        def measure(i: int, phase: str) -> dict[str, Any]:
            if phase == "pre":
                return {}
            scores: dict[str, Any] = dict(opinion_scores(self.lm, asked[i]))
            target = items[i]["target_personality"]
            texts = per_generation(self.model, self.tok, TEXT, target, edited_model=self.model, inner_q=found[i].prompt)
            return scores | texts

        records, model, edits = self._one_by_one(found, measure, None, verbose)
        return [{"case_id": r["case_id"], "time": r["time"], **r["post"]} for r in records], model, edits


def opinions_of(items: Sequence[Mapping[str, Any]], place: int) -> Opinions:
    """The opinions on a topic by side, and those on the next topic."""
    item = items[place]
    sided = list(zip(item["all_prompt"], item["all_comp"], item["all_per"], strict=True))
    ours, theirs = (
        tuple((question, text) for question, text, per in sided if (per == item["target_per"]) is same)
        for same in (True, False)
    )
    if not ours or not theirs:
        raise UsageError(f"Record {place}: there are no opinions of one of the two sides. Give opinions of both.")
    others = [each for each in (*items[place + 1 :], *items[:place]) if each["ent"] != item["ent"]][:1]
    elsewhere = tuple(pair for each in others for pair in zip(each["all_prompt"], each["all_comp"], strict=True))
    return Opinions(ours, theirs, elsewhere)
