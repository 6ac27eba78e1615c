"""Reading several answers after one prompt: the prompt is computed once and its cache serves all of them.

The same numbers as one row per answer, for models whose cache can be given to several rows; one answer is read both
ways each time, and where the two differ every answer is read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyeditor.edits.edit import ModuleEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.resume import head_at
from easyeditor.lm.text import pad


@dataclass(frozen=True)
class Row:
    """One answer after a prompt, as tokens.

    Args:
        pair: Prompt and answer.
        before: The tokens in front of the last one of the prompt, which all answers of the prompt share.
        read: The last token of the prompt, and the answer without its last token.
        labels: The answer.
    """

    pair: tuple[str, str]
    before: tuple[int, ...]
    read: tuple[int, ...]
    labels: tuple[int, ...]


def shared_rows(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[list[Row]]:
    """The pairs of which at least two have the same tokens up to the answer, in groups.

    Args:
        lm: The model.
        pairs: Prompt, as a person writes it, and answer; without repetition.

    Returns:
        Groups, shortest prompt first; none for a model with which this cannot be done: one that has a decoder of its
        own, that minds padding, or that carries an edit which looks at where a prompt ends.
    """
    gated = any(isinstance(edit, ModuleEdit) for edit in Ledger.of(lm).active)
    if lm.seq2seq or gated or lm.processors or "past_key_values" not in lm.accepts or not lm.pads_left:
        return []
    groups: dict[tuple[int, ...], list[Row]] = {}
    for prompt, answer in pairs:
        row, first = lm.text.encode_pair(lm.rewrite(prompt), answer)
        if first > 1 and first < len(row.ids):
            at = first - 1
            found = Row((prompt, answer), row.ids[:at], row.ids[at:-1], row.ids[first:])
            groups.setdefault(row.ids[:first], []).append(found)
    return sorted((rows for rows in groups.values() if len(rows) > 1), key=lambda rows: len(rows[0].before))


def shared_logits(lm: LM, groups: Sequence[list[Row]]) -> tuple[Tensor, list[Row]] | None:
    """The logits that predict each answer token of some groups.

    Args:
        lm: The model.
        groups: Of `shared_rows`.

    Returns:
        (tokens, vocab), row after row, and the rows in this order; None if the model's cache cannot be given to several
        rows.
    """
    before, mask = pad([rows[0].before for rows in groups], lm.text.pad_id, "left", lm.device)
    out = lm.run(before, mask, position_ids=_positions(mask), use_cache=True, last_only=True)
    past: Any = getattr(out, "past_key_values", None)
    if not hasattr(past, "batch_select_indices"):
        return None
    parts = _alike([(i, row) for i, group in enumerate(groups) for row in group])
    found = [_continued(lm, mask, past if part is parts[-1] else deepcopy(past), part) for part in parts]
    return torch.cat(found), [row for part in parts for _, row in part]


def _alike(rows: Sequence[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    """Rows in parts of about equal length, so that short answers are not filled up to the longest."""
    parts: list[list[tuple[int, Row]]] = []
    for each in sorted(rows, key=lambda numbered: len(numbered[1].read)):
        if not parts or len(each[1].read) > 1.5 * len(parts[-1][0][1].read) + 1:
            parts.append([])
        parts[-1].append(each)
    return parts


def _continued(lm: LM, mask: Tensor, past: Any, rows: Sequence[tuple[int, Row]]) -> Tensor:
    """The logits of the answers of some rows, (tokens, vocab).

    Args:
        lm: The model.
        mask: Of the prompts, (prompts, length).
        past: The cache of the prompts; it is used up.
        rows: The prompt of each row, by number, and the row.
    """
    of = torch.tensor([prompt for prompt, _ in rows], device=lm.device)
    past.batch_select_indices(of)
    ids, filled = pad([row.read for _, row in rows], lm.text.pad_id, "right", lm.device)
    whole = torch.cat([mask[of], filled], dim=1)
    where = torch.tensor([(i, j) for i, (_, row) in enumerate(rows) for j in range(len(row.labels))], device=lm.device)
    with head_at(lm, where[:, 0], where[:, 1]) as at:
        out = lm.run(ids, whole, position_ids=_positions(whole)[:, mask.shape[1] :], past=past, use_cache=True)
    return at.logits(logits_of(out))


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
