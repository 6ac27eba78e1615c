"""People's own records: a prompt, a new answer, and whatever probes they have; flat columns or nested dicts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from easyeditor.data.records import Layout, is_answer, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import REQUEST_KEYS, EditRequest

ALIASES = {"rephrase": "rephrase_prompt", "ood_rephrase": "rephrase_prompt", "target": "target_new"}
PROBES = {"locality": "neighborhood", "portability": "one_hop"}
FLAT_PROBES = tuple(f"{kind}_{end}" for kind in PROBES for end in ("prompt", "ground_truth"))
SEVERAL = ("rephrase_prompt", "rephrase_prompts", "rephrase", *FLAT_PROBES)
FIELDS = (*REQUEST_KEYS, *FLAT_PROBES, *ALIASES)
TARGETS = ("target_new", "target")


def split_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the cells of a CSV row: empty ones are absent, and ``|`` separates several texts in one.

    Args:
        row: Column names and texts.

    Returns:
        The fields as a JSON record would have them.
    """
    out: dict[str, Any] = {}
    for key, cell in row.items():
        text = cell.strip()
        if key in SEVERAL and "|" in text:
            out[key] = [part.strip() for part in text.split("|")]
        elif key == "case_id" and text.isdecimal():
            out[key] = int(text)
        elif text or key in ("prompt", "target_new", "target"):
            out[key] = text
    return out


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    row = _renamed(row, record)
    raw: dict[str, Any] = {key: row[key] for key in REQUEST_KEYS if row.get(key) is not None}
    for key in ("target_neg", "loc_prompt"):
        if key in raw and not isinstance(raw[key], str):
            raise UsageError(f"{record}, field '{key}': expected a text, got {raw[key]!r}.")
    if not isinstance(raw.get("case_id", 0), int):
        raise UsageError(f"{record}, field 'case_id': expected a number, got {raw['case_id']!r}.")
    truth = raw.get("ground_truth", "")
    if not is_answer(truth):
        raise UsageError(
            f"{record}, field 'ground_truth': expected a text or a list of accepted answers, got {truth!r}."
        )
    for key in ("rephrase_prompt", "rephrase_prompts"):
        raw[key] = take_texts(row, key, record)
    for kind, group in PROBES.items():
        _check_groups(raw.get(kind), kind, record)
        probe = _flat_probe(row, kind, record)
        if probe:
            nested = raw.get(kind) or {}
            if group in nested:
                raise UsageError(f"{record}: '{kind}_prompt' and '{kind}.{group}' are both given. Keep one of them.")
            raw[kind] = {**nested, group: probe}
    return EditRequest.from_dict(raw, record)


def _renamed(row: Mapping[str, Any], record: str) -> dict[str, Any]:
    for short, full in ALIASES.items():
        if row.get(short) is not None and row.get(full) is not None:
            raise UsageError(f"{record}: '{short}' and '{full}' are both given and mean the same. Keep one of them.")
    return {ALIASES.get(key, key): value for key, value in row.items() if value is not None}


def _flat_probe(row: Mapping[str, Any], kind: str, record: str) -> dict[str, Any] | None:
    prompt, answer = (row.get(f"{kind}_{end}") or None for end in ("prompt", "ground_truth"))
    if prompt is None:
        if answer is not None:
            raise UsageError(
                f"{record}, field '{kind}_ground_truth': there is no '{kind}_prompt' that it would be the answer to. "
                f"Add '{kind}_prompt', or drop the answer."
            )
        return None
    if answer is None and kind == "portability":
        raise UsageError(
            f"{record}, field 'portability_ground_truth': it is missing. Say what follows from the edit for each "
            "'portability_prompt'."
        )
    _check_prompt(prompt, f"{kind}_prompt", record)
    _check_answer(prompt, answer, f"{kind}_ground_truth", record)
    return {"prompt": prompt, "ground_truth": answer}


def _check_groups(groups: Any, kind: str, record: str) -> None:
    """Check the kinds inside ``{name: {"prompt": ..., "ground_truth": ...}}`` or lists of such probes."""
    if not isinstance(groups, Mapping):
        return
    for name, group in groups.items():
        for probe in group if isinstance(group, list) else [group]:
            if isinstance(probe, Mapping) and probe.get("prompt") is not None:
                _check_prompt(probe["prompt"], f"{kind}.{name}", record)
                _check_answer(probe["prompt"], probe.get("ground_truth"), f"{kind}.{name}", record)


def _check_prompt(prompt: Any, name: str, record: str) -> None:
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(p, str) for p in prompt)):
        raise UsageError(f"{record}, field '{name}': expected a text or a list of texts, got {prompt!r}.")


def _check_answer(prompt: Any, answer: Any, name: str, record: str) -> None:
    several = isinstance(prompt, list) and not isinstance(answer, str | list)
    if answer is not None and (several or not is_answer(answer)):
        raise UsageError(
            f"{record}, field '{name}': expected one answer (or a list of them) per prompt, got {answer!r}."
        )


def _told_by(row: Mapping[str, Any]) -> bool:
    return any(difflib.get_close_matches(key, ("prompt", *TARGETS), n=1, cutoff=0.75) for key in row)


OWN = Layout("a file of your own", _told_by, _convert, FIELDS, cells=split_cells)
