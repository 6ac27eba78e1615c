"""Sanitation (Ishibashi and Shimodaira, 2023, arXiv:2309.11852), in KnowEdit: answers to forget, and to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.data.dataset import RecordDataset, first
from easyeditor.data.records import Layout, Record, fill, matching_subject, take, take_objects, take_probes, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

HALVES = (("K_F", "K_R"), ("success", "locality"))  # forget and keep, in the training and in the test file
KEPT = 5


def _told_by(row: Mapping[str, Any]) -> bool:
    return any(forget in row and keep in row for forget, keep in HALVES)


def _parts(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """One row per question to forget, with a few to keep: the next ones in the file, and round again."""
    half = next((half for half in HALVES if half[0] in rows[index]), HALVES[0])
    gone, kept = (take_objects(rows[index], key, record, "with 'question' and 'ground_truth'") for key in half)
    for key, items in zip(half, (gone, kept), strict=True):
        if not items:
            raise UsageError(f"{record}, field '{key}': it holds no question. Add at least one.")
    return [
        {**item, "kept": [kept[(place * KEPT + step) % len(kept)] for step in range(min(KEPT, len(kept)))]}
        for place, item in enumerate(gone)
    ]


def _convert(row: Mapping[str, Any], record: str, template: str = "{}") -> EditRequest:
    prompt = fill(template, take(row, "question", str, record), record, "template")
    kept = [
        {**probe, "prompt": fill(template, probe["prompt"], record, "template")}
        for probe in take_probes(row, "kept", "question", "ground_truth", record)
    ]
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "target_new", str, record),
            "subject": matching_subject(row, prompt),
            "ground_truth": take_texts(row, "ground_truth", record),
            "locality": {"unrelated": kept},
        },
        record,
    )


SANITATION = Layout("Sanitation", _told_by, _convert, parts=_parts, whole=True)


class SanitizationTrainDataset(RecordDataset):
    """Sanitation (TriviaQA).

    Args:
        data_dir: The file, with ``K_F`` and ``K_R`` or with ``success`` and ``locality``.
        template: A text with ``{}`` for the question.
        specify_answers: Use only questions with these answers; all if left out.
        size: Use at most this many questions.
        config: Kept as it is.

    Each item is a dict with ``case_id``, ``prompt``, ``target_new``, ``ground_truth``, and the lists
    ``locality_prompt`` and ``locality_ground_truth`` of answers to keep.
    """

    def __init__(
        self,
        data_dir: str | Path,
        template: str = "{}",
        specify_answers: Sequence[str] | None = None,
        size: int | None = None,
        config: Any = None,
    ) -> None:
        self.layout = Layout(
            SANITATION.name,
            _told_by,
            lambda row, record: _convert(row, record, template),
            parts=_parts,
            usable=lambda row: specify_answers is None or row.get("ground_truth") in specify_answers,
            skipped="their answer is not among those that were asked for",
            whole=True,
        )
        super().__init__(data_dir, None, config)
        self._items, self._requests = first(self._items, size), first(self._requests, size)

    def _items_of(self, edits: Sequence[Record]) -> list[dict[str, Any]]:
        return [
            {
                "case_id": place,
                "prompt": edit.request.prompt,
                "target_new": edit.request.target_new,
                "ground_truth": edit.request.ground_truth,
                "locality_prompt": [probe.prompt for probe in edit.request.locality.get("unrelated", ())],
                "locality_ground_truth": [probe.answers[0] for probe in edit.request.locality.get("unrelated", ())],
            }
            for place, edit in enumerate(edits)
        ]
