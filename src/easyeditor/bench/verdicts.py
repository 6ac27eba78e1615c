"""A judge's verdicts on the answers of a run: asked for when all is measured, and kept in the run folder.

They are made of what the log holds, so nothing waits for them and nothing depends on them: where the judge does not
answer, cases stay unscored, and the same command asks for what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from easyeditor.bench.log import Line
from easyeditor.editors.progress import tracked
from easyeditor.errors import UsageError
from easyeditor.metrics.extra import place_of_verdicts, put_verdicts, to_judge
from easyeditor.metrics.judge import Case, Judge, verdicts_in
from easyeditor.requests import EditRequest

FILE = "verdicts.jsonl"
WAY = "free_generation"  # how the answers that are judged were had


def judge_at(url: str | None = None, model: str | None = None, calls: int = 1000) -> Judge:
    """The judge that is named, here or by the environment.

    Args:
        url: Its endpoint, up to ``/v1``; else ``$EASYEDITOR_JUDGE_URL``. A key is ``$EASYEDITOR_JUDGE_KEY``.
        model: Its name there; else ``$EASYEDITOR_JUDGE_MODEL``.
        calls: The most requests, retries included.

    Raises:
        UsageError: It has no endpoint or no name, or the endpoint is no address.
    """
    url, model = url or os.environ.get("EASYEDITOR_JUDGE_URL"), model or os.environ.get("EASYEDITOR_JUDGE_MODEL")
    if not url or not model:
        raise UsageError(
            "A judge needs an endpoint and a name: pass --judge-url and --judge-model, or set $EASYEDITOR_JUDGE_URL "
            "and $EASYEDITOR_JUDGE_MODEL; a key goes into $EASYEDITOR_JUDGE_KEY."
        )
    return Judge(model, url, os.environ.get("EASYEDITOR_JUDGE_KEY"), calls=calls)


def judge_run(folder: Path, lines: Iterable[Line], judge: Judge) -> None:
    """Ask a judge about all answers of a run that it has not judged.

    Args:
        folder: Of the run.
        lines: Lines with ``post`` and ``requested_rewrite``.
        judge: Who is asked; without verdicts it leaves one sentence in the log.
    """
    judge.keep_in(folder / FILE)
    judge.verdicts(
        (case for line in lines for cases in _asked(line).values() for case in cases),
        watch=lambda asked, n: tracked(asked, n, label="judge"),
    )


def known(folder: Path, judge: str) -> dict[Case, float]:
    """What a judge has said of answers of a run."""
    return verdicts_in(folder / FILE, judge)


def judged(line: Line, judge: str, said: Mapping[Case, float]) -> Line:
    """A line with the verdicts on its answers; None where there is none.

    Args:
        line: With ``post`` and ``requested_rewrite``.
        judge: The judge's name.
        said: Its verdicts; see `known`.
    """
    groups = _asked(line)
    if not groups:
        return line
    post = {**line["post"], "metric_meta": dict(line["post"]["metric_meta"])}
    post["portability"] = dict(post["portability"])
    for name, cases in groups.items():
        verdicts = [said.get(case._replace(answers=tuple(sorted(case.answers)))) for case in cases]
        put_verdicts(post, name, verdicts, _protocol(post["metric_meta"][f"{name}_gen"], judge))
    return {**line, "post": post}


def unjudged(line: Line) -> Iterator[bool]:
    """Of each answer that a judge is asked about: whether it has no verdict."""
    for name, cases in _asked(line).items():
        where, key = place_of_verdicts(line["post"], name)
        yield from (verdict is None for case, verdict in zip(cases, where[key], strict=True) if case.answers)


def _asked(line: Line) -> dict[str, list[Case]]:
    if "unscored" in line["post"]:
        return {}
    return to_judge(EditRequest.from_dict(line["requested_rewrite"], "A case of the run"), line["post"])


def _protocol(generated: Mapping[str, Any], judge: str) -> dict[str, Any]:
    """The protocol of a verdict on an answer, from that of its exact match."""
    name = generated["protocol"].replace(WAY, f"{WAY}_judge", 1)
    scorer = f"llm_judge:{judge}"
    family = generated["comparable_group"].partition(".")[0]
    return {
        **generated,
        "result_key": generated["result_key"].replace("_gen", "_judge"),
        "protocol": name,
        "scorer": scorer,
        "comparable_group": f"{family}.{name}.{scorer}",
    }
