"""Which locality probes are none: questions whose answers the run itself has changed by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.bench.log import Line
from easyeditor.bench.schedule import Schedule

SCORES = ("_gen", "_acc", "_js")  # of locality probes, one value each


def without_edited(
    cases: Sequence[Line], checkpoints: Sequence[Line], schedule: Schedule
) -> tuple[list[Line], list[Line]]:
    """The lines of a row and a seed with None for the locality of probes that are edited themselves.

    Args:
        cases: The cases.
        checkpoints: The cases at checkpoints.
        schedule: Which facts are edited together, and whether edits stay.

    Returns:
        Both, in their order; what was answered is still there.
    """
    asked = {line["case"]: line["requested_rewrite"] for line in cases}
    edited: dict[int, set[str]] = {}  # step -> the questions that are edited in it
    for line in cases:
        edited.setdefault(line["step"], set()).update(_wordings(line["requested_rewrite"]))
    so_far: dict[int, set[str]] = {}
    for step in sorted(edited):
        so_far[step] = edited[step].union(*([so_far[max(so_far)]] if so_far else []))

    def marked(line: Line, prompts: set[str]) -> Line:
        return {**line, "post": _without(line["post"], asked[line["case"]], prompts)} if line["case"] in asked else line

    by_step = so_far if schedule.stays else edited
    ends = {step.stop: so_far.get(i, set()) for i, step in enumerate(schedule.steps(max(asked, default=-1) + 1))}
    return (
        [marked(line, by_step[line["step"]]) for line in cases],
        [marked(line, ends.get(line["edited"], set())) for line in checkpoints],
    )


def _wordings(request: Mapping[str, Any]) -> list[str]:
    others = request.get("rephrase_prompt") or []
    return [request["prompt"], *([others] if isinstance(others, str) else others)]


def _without(post: Mapping[str, Any], request: Mapping[str, Any], prompts: set[str]) -> Mapping[str, Any]:
    """Scores without those of probes that are among some prompts."""
    locality = dict(post.get("locality", {}))
    for name, probes in request.get("locality", {}).items():
        listed = [probes["prompt"]] if isinstance(probes["prompt"], str) else probes["prompt"]
        for key in (f"{name}{score}" for score in SCORES):
            if key in locality and not prompts.isdisjoint(listed):
                values = zip(listed, locality[key], strict=True)
                locality[key] = [None if prompt in prompts else value for prompt, value in values]
    return {**post, "locality": locality} if "locality" in post else post
