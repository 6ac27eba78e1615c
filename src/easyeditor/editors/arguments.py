"""From the parallel lists of `BaseEditor.edit` to requests: everything is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest, Probe, probes_of

Texts = str | Sequence[Any] | None


def requests_from_lists(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    ground_truth: Texts = None,
    target_neg: Texts = None,
    rephrase_prompts: Texts = None,
    locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    subject: Texts = None,
    loc_prompts: Texts = None,
) -> list[EditRequest]:
    """One request per prompt.

    Args:
        prompts: One text or a list; all other lists have its length.
        target_new: The new answers.
        ground_truth: The old answers.
        target_neg: Answers to move away from.
        rephrase_prompts: For each prompt another wording, or a list of them.
        locality_inputs: ``{name: {"prompt": list, "ground_truth": list}}``; an entry may be a text, a list of texts or
            None for no probe.
        portability_inputs: Likewise.
        subject: The subjects.
        loc_prompts: Unrelated texts; fewer than prompts are used in turn.

    Raises:
        UsageError: Lengths differ, or an entry is wrong; the message names record, field and remedy.
    """
    listed = _column("prompts", prompts, None)
    count = len(listed)
    columns = {
        "target_new": _column("target_new", target_new, count),
        "ground_truth": _column("ground_truth", ground_truth, count),
        "target_neg": _column("target_neg", target_neg, count),
        "rephrase_prompt": _column("rephrase_prompts", rephrase_prompts, count),
        "subject": _column("subject", subject, count),
    }
    unrelated = [loc_prompts] if isinstance(loc_prompts, str) else list(loc_prompts or [])
    groups = {
        "locality": _groups("locality_inputs", locality_inputs, count),
        "portability": _groups("portability_inputs", portability_inputs, count),
    }
    out = []
    for i, prompt in enumerate(listed):
        raw: dict[str, Any] = {"prompt": prompt, **{name: column[i] for name, column in columns.items()}}
        raw |= {name: probes[i] for name, probes in groups.items()}
        raw["loc_prompt"] = unrelated[i % len(unrelated)] if unrelated else None
        out.append(EditRequest.from_dict(raw, f"Record {i}"))
    return out


def _column(name: str, value: Texts, count: int | None) -> list[Any]:
    if value is None:
        return [None] * (count or 0)
    column = [value] if isinstance(value, str) else list(value)
    if count is not None and len(column) != count:
        raise UsageError(
            f"'{name}' has {len(column)} entries and 'prompts' has {count}. Give one entry per prompt (None for none)."
        )
    return column


def _groups(
    name: str, inputs: Mapping[str, Mapping[str, Any]] | None, count: int
) -> list[dict[str, tuple[Probe, ...]]]:
    out: list[dict[str, Any]] = [{} for _ in range(count)]
    for group, columns in (inputs or {}).items():
        where = f"{name}.{group}"
        if not isinstance(columns, Mapping) or "prompt" not in columns:
            raise UsageError(f"'{where}': expected {{'prompt': [...], 'ground_truth': [...]}}. Add 'prompt'.")
        if unknown := set(columns) - {"prompt", "ground_truth"}:
            raise UsageError(f"'{where}': unknown key '{sorted(unknown)[0]}'. Known: prompt, ground_truth.")
        prompts = _column(f"{where}.prompt", columns["prompt"], count)
        answers = _column(f"{where}.ground_truth", columns.get("ground_truth"), count)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if prompt is not None:
                out[i][group] = list(probes_of(f"Record {i}", where, prompt, answer))
    return out
