"""What a record of an edit looks like, and how records are written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.edits.edit import Edit
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)


def record_of(
    index: int,
    request: EditRequest,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    seconds: float,
    outcome: Edit | Exception,
) -> dict[str, Any]:
    """The record of one request: measurements before and right after its edit, and what was asked for."""
    record = {
        "pre": before,
        "case_id": index if request.case_id is None else request.case_id,
        "requested_rewrite": request.to_dict(),
        "post": after,
        "time": seconds,
        "edit_id": outcome.id if isinstance(outcome, Edit) else None,
    }
    return record if isinstance(outcome, Edit) else {**record, "error": str(outcome)}


def tell(records: Sequence[Mapping[str, Any]], edits: Sequence[Edit], sequential: bool, verbose: bool) -> None:
    """Log records, and that a model which is returned carries none of several edits.

    Args:
        records: What was measured.
        edits: The edits that were made.
        sequential: Whether they stay on the model.
        verbose: Whether to log the records.
    """
    for record in records if verbose else ():
        log.info("%s: %s", record["case_id"], {key: record[key] for key in ("pre", "post")})
    if len(edits) > 1 and not sequential:
        log.warning(
            "%d edits were each made on the pristine model and taken back: the returned model carries none of them. "
            "The third value holds them; pass sequential_edit=True to keep all on the model.",
            len(edits),
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, and move it to its place when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


def texts_only(scores: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """The generated texts of a measurement, under the names of `BaseEditor.generate_edit`."""
    out = {
        f"{name}_ans": scores[f"{name}_gen_content"]
        for name in ("rewrite", "rephrase")
        if f"{name}_gen_content" in scores
    }
    for group in ("locality", "portability"):
        texts = [text for key, found in scores[group].items() if key.endswith("_gen_content") for text in found]
        if texts:
            out[f"{group}_ans"] = texts
    if phase == "post" and "fluency" in scores:
        out["fluency"] = scores["fluency"]
    return out
