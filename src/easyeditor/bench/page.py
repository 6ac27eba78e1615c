"""The report as one page of HTML that needs nothing else: tables, plots, what failed, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from easyeditor.bench.cost import PARTS
from easyeditor.bench.plots import HUES, Bar, Dot, Pair, Track, bars, lines, pairs, scatter
from easyeditor.bench.results import ENDS, Results, RowResult
from easyeditor.bench.tables import (
    PHASES,
    Sheet,
    capability_sheet,
    cost_sheet,
    failures,
    notes,
    quality_sheets,
    retention_sheet,
    scores_sheet,
    title,
)

SHOWN = 50  # failed edits that are listed

STYLE = """
:root { --paper: #fff; --ink: #1d2430; --soft: #667085; --rule: #e3e6eb; --bad: #b42318;
  --c0: #2f6db5; --c1: #d9822b; --c2: #2e8b57; --c3: #b33a4b; --c4: #7a56a8;
  --c5: #8a6242; --c6: #c15d9d; --c7: #5f6b7a; --c8: #8f9a1f; --c9: #1f97a3; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e6e9ee; --soft: #98a2b3; --rule: #2b323d;
  --bad: #ff8a7a; --c0: #6aa5ea; --c1: #f0a45d; --c2: #5fc08c; --c3: #ea7a89; --c4: #b293de;
  --c5: #c09a78; --c6: #e591c4; --c7: #a3afbf; --c8: #c3cf55; --c9: #58cdd8; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.note { color: var(--soft); margin: .5rem 0; max-width: 60rem; }
p.fault { color: var(--bad); font-weight: 700; font-size: 1.1rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th.number, td.number { text-align: right; } th { color: var(--soft); font-weight: 600; }
td.remarks { white-space: normal; color: var(--soft); min-width: 11rem; max-width: 26rem; }
tr.control td { color: var(--soft); }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .6rem; }
div.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 2rem 3rem; }
svg { width: 100%; height: auto; font-size: 12px; } svg text { fill: var(--ink); }
.grid { stroke: var(--rule); } .leader { stroke: var(--rule); stroke-dasharray: 2 3; }
.track { fill: none; stroke-width: 2; } .ring, .hollow { fill: var(--paper); stroke-width: 2; } .hollow { fill: none; }
""" + "".join(
    f".fill{i}, svg text.fill{i} {{ fill: var(--c{i}); }} .stroke{i} {{ stroke: var(--c{i}); }}\n" for i in range(HUES)
)


def page(runs: Sequence[Results]) -> str:
    """The page of runs that may stand in one table.

    Raises:
        UsageError: The runs have different protocols.
    """
    qualities, retention = quality_sheets(runs), retention_sheet(runs)
    controls = {each.row.name for run in runs for each in run.rows if each.row.control}
    faults = [fault for run in runs for fault in run.faults]
    parts = [f"<h1>{escape(title(runs))}</h1>", *(f'<p class="fault">{escape(fault)}</p>' for fault in faults)]
    for sheet in qualities:
        parts += [f"<h2>{escape(sheet.title)}</h2>", _table(sheet, controls)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes(runs) if note not in faults]
    parts += ["<h2>Plots</h2>", f'<div class="plots">{"".join(_plots(runs))}</div>']
    if retention is not None:
        parts += ["<h2>Retention of all earlier edits</h2>", _table(retention, controls)]
    parts += ["<h2>Cost</h2>", _table(cost_sheet(runs), controls)]
    if (capable := capability_sheet(runs)) is not None:
        parts += ["<h2>Capability</h2>", _table(capable, controls)]
    failed = failures(runs)
    if failed:
        items = "".join(f"<li>{escape(each)}</li>" for each in failed[:SHOWN])
        more = f"<p>and {len(failed) - SHOWN} more, in the logs</p>" if len(failed) > SHOWN else ""
        parts.append(f"<h2>Failed edits</h2><ul>{items}</ul>{more}")
    parts.append(f"<details><summary>All scores</summary>{_table(scores_sheet(runs), controls)}</details>")
    for run in runs:
        about = escape(json.dumps(run.header, indent=1, ensure_ascii=False, default=str))
        parts.append(f"<details><summary>How {escape(run.folder.name)} was made</summary><pre>{about}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(title(runs))}</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width">'
    return f"<!doctype html>\n<html lang='en'><head>{view}{head}</head><body>{chr(10).join(parts)}</body></html>\n"


def _plots(runs: Sequence[Results]) -> list[str]:
    """Each plot that there are numbers for, with its caption."""
    found = [(run, each) for run in runs for each in run.rows if each.cases]
    rows = [(_name(run, each, len(runs)), hue, each) for hue, (run, each) in enumerate(found)]
    phase = "final" if all("final" in run.phases for run in runs) else "post"
    when = PHASES[phase]
    plots = []
    dots = [dot for name, hue, each in rows if (dot := _dot(name, hue, each, phase)) is not None]
    if dots:
        plots.append((scatter(dots, "locality", "reliability", "generalisation"), f"Quality against locality, {when}"))
    edits = [(name, hue, each) for name, hue, each in rows if each.row.method]
    tracks = [
        Track(name, hue, points)
        for name, hue, each in edits
        if (points := [(float(end), m["reliability"].mean) for end, m in each.retention() if "reliability" in m])
    ]
    if tracks:
        caption = "Retention: how much of all earlier edits holds, over the number of edits"
        plots.append((lines(tracks, "edits on the model", "reliability of all earlier edits"), caption))
        ends = [
            Pair(name, hue, both[0].mean, both[1].mean)
            for name, hue, each in edits
            if (both := each.first_and_last().get("at the end")) is not None and each.ends
        ]
        caption = f"First and last edits: reliability at the end, of the first and of the last 1/{ENDS} of the edits"
        plots.append((pairs(ends, "first edits", "last edits"), caption))
    edited = [(name, each.cost()) for name, _, each in edits]
    timed = [
        Bar(name, [(part, cost.get(part, 0.0)) for part in (*PARTS, "other")])
        for name, cost in edited
        if "edit" in cost
    ]
    if timed:
        plots.append((bars(timed, "s"), "Seconds per edited fact, by part"))
    for where, caption in (("cpu", "Memory of the process at the peak"), ("device", "Memory of the accelerator")):
        used = [Bar(n, [("memory", c[f"memory_{where}"] / 2**20)]) for n, c in edited if f"memory_{where}" in c]
        if used:
            plots.append((bars(used, "MB"), f"{caption} of an edit"))
    return [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for svg, caption in plots]


def _dot(name: str, hue: int, each: RowResult, phase: str) -> Dot | None:
    found = each.headlines(phase)
    if "reliability" not in found or "locality" not in found:
        return None
    below = found["generalisation"].mean if "generalisation" in found else None
    return Dot(name, hue, found["locality"].mean, found["reliability"].mean, below)


def _name(run: Results, each: RowResult, runs: int) -> str:
    name = f"{each.row.name} *" if each.row.in_context else each.row.name
    return name if runs == 1 else f"{run.folder.name}: {name}"


def _table(sheet: Sheet, controls: set[str]) -> str:
    numbers = set(sheet.numbers)

    def cell(tag: str, column: str, text: str | None) -> str:
        style = ' class="number"' if column in numbers else ' class="remarks"' if column == "remarks" else ""
        return f"<{tag}{style}>{escape(text) if text is not None else '&ndash;'}</{tag}>"

    head = "".join(cell("th", column, column) for column in sheet.columns)
    where = sheet.columns.index("row")
    body = []
    for row in sheet.rows:
        style = ' class="control"' if (row[where] or "").removesuffix(" *") in controls else ""
        cells = "".join(cell("td", column, text) for column, text in zip(sheet.columns, row, strict=True))
        body.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
