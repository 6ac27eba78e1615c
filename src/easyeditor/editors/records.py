"""What a record of an edit looks like, and how records are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyeditor.edits.edit import Edit
from easyeditor.requests import EditRequest


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
