"""`easyedit report`: the tables and the page of runs; and before and after: what was answered about an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from easyeditor.cli.common import door, emit, out, table
from easyeditor.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from easyeditor.bench.results import Results
    from easyeditor.requests import EditRequest

EDITED, PARAPHRASE, FOLLOWS, NEIGHBOUR = "edited", "paraphrase", "follows", "neighbour"


@door
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="The folder of a run. Repeatable.")],
    place: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write the files; else into the first run.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the table of one run or several, and write it as Markdown, CSV and a page with plots.

    Runs that were made under different protocols are not put into one table.
    """
    from easyeditor.bench.results import Results, check_comparable

    runs = [Results.of(folder) for folder in folders]
    check_comparable(runs)
    files = written(runs, place or folders[0])
    if as_json:
        emit(document(runs, files))
        return
    shown(runs, out())
    out().print(f"Written: {', '.join(str(file) for file in files)}", markup=False, soft_wrap=True)


def shown(runs: Sequence[Results], console: Console) -> None:
    """Print the tables of runs, with what must be known to read them."""
    from easyeditor.bench.tables import capability_sheet, cost_sheet, notes, quality_sheets, retention_sheet

    for sheet in (*quality_sheets(runs), retention_sheet(runs), cost_sheet(runs), capability_sheet(runs)):
        if sheet is not None:
            console.print(table(sheet.title, sheet.columns, sheet.rows, right=sheet.numbers))
            console.print()
    for note in notes(runs):
        console.print(note, markup=False)


def written(runs: Sequence[Results], folder: Path) -> list[Path]:
    """Write the report of runs: ``report.md``, ``report.csv`` and ``report.html``.

    Raises:
        EditFailed: The folder cannot be written.
    """
    from easyeditor.bench.log import written as writing
    from easyeditor.bench.page import page
    from easyeditor.bench.tables import as_csv, markdown

    files = []
    for name, make in (("report.md", markdown), ("report.csv", as_csv), ("report.html", page)):
        path = folder / name
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{name}.partial"
            temporary.write_text(make(runs), encoding="utf-8")
            temporary.replace(path)
        files.append(path)
    return files


def document(runs: Sequence[Results], files: Sequence[Path]) -> dict[str, Any]:
    """What a report says, as one JSON document."""
    return {
        "protocol": runs[0].protocol,
        "files": list(files),
        "runs": [
            {
                "folder": run.folder,
                "model": run.header["model"],
                "faults": run.faults,
                "rows": [
                    {
                        "row": each.row.name,
                        "n": len(each.cases),
                        "answer_in_context": each.row.in_context,
                        "remarks": each.remarks,
                        **{phase: {k: vars(m) for k, m in each.headlines(phase).items()} for phase in run.phases},
                        "cost": each.cost(),
                        "capability": {k: {**vars(m), "protocol": p} for k, (m, p) in each.capability().items()},
                    }
                    for each in run.rows
                ],
            }
            for run in runs
        ],
    }


class Answered(NamedTuple):
    """A question with what was said before and after.

    Args:
        fact: The position of its fact among those edited.
        kind: What it is to the edit.
        prompt: The text in front of the answer.
        before: The answer of the untouched model.
        after: The answer with the edits on it.
        as_wanted: Whether that is the new answer, or the old one for a neighbour; None if nobody can say.
    """

    fact: int
    kind: str
    prompt: str
    before: str
    after: str
    as_wanted: bool | None


def answered(requests: Sequence[EditRequest], records: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """What was asked and answered about each fact.

    Args:
        requests: The facts.
        records: What the editor recorded of them, in the same order.
    """
    found: list[Answered] = []
    for i, (request, record) in enumerate(zip(requests, records, strict=True)):
        before, after = record["pre"], record.get("final", record["post"])
        groups = [(EDITED, "rewrite", [request.prompt], before, after)]
        groups.append((PARAPHRASE, "rephrase", list(request.rephrase_prompts), before, after))
        for kind, name, named in (
            (FOLLOWS, "portability", request.portability),
            (NEIGHBOUR, "locality", request.locality),
        ):
            groups += [
                (kind, key, [p.prompt for p in probes], before[name], after[name]) for key, probes in named.items()
            ]
        for kind, key, prompts, old, new in groups:
            if prompts:
                found += [Answered(i, kind, *each) for each in _texts(key, prompts, old, new)]
    return found


def comparison(rows: Sequence[Answered]) -> Table:
    """A table of questions with the answers before and after."""
    marks = {True: "yes", False: "no", None: None}
    cells = [(a.kind, a.prompt, a.before or "(nothing)", a.after or "(nothing)", marks[a.as_wanted]) for a in rows]
    return table("", ("question", "prompt", "before", "after", "as wanted"), cells)


def _texts(
    key: str, prompts: list[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, bool | None]]:
    said = zip(prompts, old[f"{key}_gen_content"], new[f"{key}_gen_content"], new[f"{key}_gen"], strict=True)
    for prompt, before, after, good in said:
        yield prompt, before, after, None if good is None else bool(good)
