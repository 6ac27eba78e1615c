"""The tables of a report, as text that a terminal, a Markdown file and a page can show, and all numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.bench.cost import PARTS
from easyeditor.bench.results import HEADLINES, HELD, Mean, Results, RowResult, check_comparable

PHASES = {"post": "right after its edit", "final": "at the end"}
COSTS = (*PARTS, "other", "edit", "scoring")
UNITS = (
    "Perplexity: the median over held-out texts, with the edits of the first step on the model, or with all that stay. "
    "Cost: seconds per fact, by part of the edit; 'edit' is their sum; 'once' is what is prepared once per model. MB: "
    "the process at the peak of an edit; device MB: the accelerator. KB: the tensors of an edit, per fact. ms/token: "
    "what an edit adds to each generated token, the prompt's pass included."
)
CONTEXT = "*"  # marks a row whose answers stand in the context


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Args:
        title: Above it.
        columns: The headings.
        rows: The cells; None where there is nothing.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | None, ...]]

    @property
    def numbers(self) -> tuple[str, ...]:
        """The headings of columns of numbers."""
        return tuple(name for name in self.columns if name not in ("row", "run", "model", "data", "remarks"))


def quality_sheets(runs: Sequence[Results]) -> list[Sheet]:
    """Reliability, generalisation, locality and portability of each row, mean and standard error over n cases.

    Args:
        runs: The runs.

    Returns:
        One table for each time at which cases were scored: right after their edit, and at the end.

    Raises:
        UsageError: The runs have different protocols.
    """
    check_comparable(runs)
    phases = [phase for phase in PHASES if any(phase in run.phases for run in runs)]
    return [_quality(runs, phase, len(phases) > 1) for phase in phases]


def _quality(runs: Sequence[Results], phase: str, several: bool) -> Sheet:
    found = [(run, each, each.headlines(phase)) for run in runs for each in run.rows]
    names = [name for name, _ in HEADLINES if any(name in means for _, _, means in found)]
    labels, rows = _labels(runs), []
    for run, each, means in found:
        n = str(len(each.scored(phase)))
        seconds = each.cost().get("edit") if each.row.method else None
        text = _perplexity(run, each)
        last = (_number(text), _number(seconds), "; ".join(each.remarks) or None)
        rows.append((*labels[id(run)], _name(each), n, *(_text(means.get(name)) for name in names), *last))
    columns = (*_label_heads(runs), "row", "n", *names, "perplexity", "s per fact", "remarks")
    return Sheet(f"Quality {PHASES[phase]}" if several else "Quality", columns, rows)


def _perplexity(run: Results, each: RowResult) -> float | None:
    """The median over held-out texts; that of the unedited model is what the other rows began with."""
    if each.row.control != "unedited":
        found = (each.perplexity or {}).get("after", {})
    else:
        found = next((other.perplexity["before"] for other in run.rows if other.perplexity), {})
    median: float | None = found.get("median")
    return median


def cost_sheet(runs: Sequence[Results]) -> Sheet:
    """Seconds per fact by part, what was spent once, memory at the peak, bytes per fact, added latency."""
    labels, rows = _labels(runs), []
    for run in runs:
        for each in run.rows:
            cost = each.cost()
            if not cost:
                continue
            seconds = [_number(cost.get(part)) for part in (*COSTS, "preparation")]
            memory = [_scaled(cost.get(f"memory_{where}"), 2**20, 0) for where in ("cpu", "device")]
            rest = (_scaled(cost.get("bytes"), 2**10, 1), _scaled(cost.get("latency"), 1e-3, 2))
            rows.append((*labels[id(run)], _name(each), *seconds, *memory, *rest))
    rest_heads = ("once", "MB", "device MB", "KB", "ms/token")
    return Sheet("Cost", (*_label_heads(runs), "row", *COSTS, *rest_heads), rows)


def capability_sheet(runs: Sequence[Results]) -> Sheet | None:
    """Scores of tasks of lm-evaluation-harness, by row; None where none was asked for."""
    labels, rows = _labels(runs), []
    names = list(dict.fromkeys(name for run in runs for each in run.rows for name in each.capability()))
    for run in runs:
        for each in run.rows:
            if each.tasks:
                found = each.capability()
                cells = [_text(found[name][0]) if name in found else None for name in names]
                rows.append((*labels[id(run)], _name(each), *cells))
    return Sheet("Capability", (*_label_heads(runs), "row", *names), rows) if rows else None


def scores_sheet(runs: Sequence[Results]) -> Sheet:
    """All scores of all rows, one to a line."""
    rows = [
        (*_labels(runs)[id(run)], _name(each), PHASES[phase], name, str(mean), str(mean.n), each.protocols.get(name))
        for run in runs
        for each in run.rows
        for phase in run.phases
        for name, mean in each.means(phase).items()
    ]
    return Sheet("All scores", (*_label_heads(runs), "row", "when", "score", "mean", "n", "protocol"), rows)


def retention_sheet(runs: Sequence[Results]) -> Sheet | None:
    """Headline scores of all facts edited so far, by how many that are; None without sequential runs."""
    labels = _labels(runs)
    found = [(run, each, end, means) for run in runs for each in run.rows for end, means in each.retention()]
    if not found:
        return None
    names = [name for name in (HELD, *(name for name, _ in HEADLINES)) if any(name in means for *_, means in found)]
    rows: list[tuple[str | None, ...]] = [
        (*labels[id(run)], _name(each), str(end), *(_text(means.get(name)) for name in names))
        for run, each, end, means in found
    ]
    return Sheet("Retention", (*_label_heads(runs), "row", "edits", *names), rows)


def notes(runs: Sequence[Results]) -> list[str]:
    """What must be said under the tables: faults of the controls, the protocol, what the signs mean."""
    found = [fault for run in runs for fault in run.faults]
    found += [f"Unfinished: {run.folder}." for run in runs if any(len(r.cases) < r.expected for r in run.rows)]
    for run in runs:
        asked, silent = run.unjudged
        if silent:
            who = run.header["plan"]["judge"]
            found.append(
                f"{run.folder}: the judge {who} gave no verdict on {silent} of {asked} answers; "
                "they are unscored. The same command asks again for them."
            )
        why = {line["scores"]["unscored"] for each in run.rows for line in each.tasks if "unscored" in line["scores"]}
        found += [f"Capability unscored: {reason}" for reason in sorted(why)]
    found += ["Protocol: " + "; ".join(f"{name}: {value}" for name, value in runs[0].protocol.items()) + "."]
    found.append(
        "Mean ± standard error over n cases; a case with several probes of a kind counts once. Locality leaves out "
        "questions that the run has edited itself by then."
    )
    found.append(UNITS)
    if any(each.row.in_context for run in runs for each in run.rows):
        found.append(f"{CONTEXT} The answer stands in the context: nothing was learnt, it was read.")
    return found


def markdown(runs: Sequence[Results]) -> str:
    """The report as Markdown."""
    retention = retention_sheet(runs)
    capable = capability_sheet(runs)
    sheets = [*quality_sheets(runs), cost_sheet(runs), *(sheet for sheet in (retention, capable) if sheet)]
    parts = [f"# {title(runs)}", *notes(runs)]
    for sheet in sheets:
        parts += [f"## {sheet.title}", _markdown(sheet)]
    failed = failures(runs)
    parts += ["## Failed edits", "\n".join(f"- {each}" for each in failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def failures(runs: Sequence[Results]) -> list[str]:
    """Each failed edit with its sentence."""
    return [
        f"{each.row.name}, seed {line['seed']}, case {line['case']}: {line['error']}"
        for run in runs
        for each in run.rows
        for line in each.failed
    ]


def as_csv(runs: Sequence[Results]) -> str:
    """All numbers, one to a line: scores, retention and costs, with n, standard error and protocol."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("run", "model", "data", "row", "in_context", "kind", "name", "edits", "mean", "stderr", "n", "protocol")
    )
    for run in runs:
        about = (run.folder.name, run.header["model"]["name"], run.header["plan"]["data"])
        how = "; ".join(f"{name}: {value}" for name, value in run.protocol.items())
        for each in run.rows:
            head = (*about, each.row.name, int(each.row.in_context))
            for phase in run.phases:
                for name, mean in each.headlines(phase).items():
                    writer.writerow((*head, phase, name, "", *_three(mean), how))
            protocols = each.protocols
            for phase in run.phases:
                for name, mean in each.means(phase).items():
                    writer.writerow((*head, phase, name, "", *_three(mean), f"{how}; {protocols.get(name, '')}"))
            for end, means in each.retention():
                for name, mean in means.items():
                    writer.writerow((*head, "retention", name, end, *_three(mean), how))
            for name, (mean, protocol) in each.capability().items():
                writer.writerow((*head, "capability", name, "", *_three(mean), protocol))
            for name, value in each.cost().items():
                writer.writerow((*head, "cost", name, "", value, "", "", ""))
    return file.getvalue()


def title(runs: Sequence[Results]) -> str:
    """What a report is about."""
    models = ", ".join(dict.fromkeys(str(run.header["model"]["name"]) for run in runs))
    return f"Editing {models}: {runs[0].protocol['schedule']}"


def _three(mean: Mean) -> tuple[Any, ...]:
    return mean.mean, "" if mean.stderr is None else mean.stderr, mean.n


def _name(each: RowResult) -> str:
    return f"{each.row.name} {CONTEXT}" if each.row.in_context else each.row.name


def _labels(runs: Sequence[Results]) -> dict[int, tuple[str, ...]]:
    """What tells the runs apart: their folder, and model and data where they differ."""
    heads = _label_heads(runs)
    found = {}
    for run in runs:
        what = {"run": run.folder.name, "model": run.header["model"]["name"], "data": run.header["plan"]["data"]}
        found[id(run)] = tuple(str(what[head]) for head in heads)
    return found


def _label_heads(runs: Sequence[Results]) -> tuple[str, ...]:
    if len(runs) < 2:
        return ()
    models = {run.header["model"]["fingerprint"] for run in runs}
    data = {run.header["plan"]["data_hash"] for run in runs}
    return ("run", *(["model"] if len(models) > 1 else []), *(["data"] if len(data) > 1 else []))


def _text(mean: Mean | None) -> str | None:
    return None if mean is None else str(mean)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _scaled(value: float | None, unit: float, digits: int) -> str | None:
    return None if value is None else f"{value / unit:.{digits}f}"


def _markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str | None]) -> str:
        return "| " + " | ".join((cell or "-").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if name in sheet.numbers else "---" for name in sheet.columns) + "|"
    return "\n".join([line(sheet.columns), rule, *(line(row) for row in sheet.rows)])
