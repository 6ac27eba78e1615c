"""`easyedit eval`: what the edits of a data set are worth; each result is on disk as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from easyeditor.cli.common import door, emit, keep_what_is_there, out, remark_on, table, waiting
from easyeditor.cli.facts import many_facts
from easyeditor.cli.options import (
    ChatOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    HparamsOption,
    JsonOption,
    LayoutOption,
    LoadedModelOption,
    MethodOption,
    SeedOption,
    SetOption,
)
from easyeditor.cli.settings import Choice
from easyeditor.errors import UsageError
from easyeditor.plain import plain


@door
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data file, or tinyfacts, or tinyfacts:tuning.")],
    layout: LayoutOption = None,
    method: MethodOption = "ROME",
    model: LoadedModelOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many facts.")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Leave each edit on, and score again on the final model.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Facts per edit, for methods that take several.")] = None,
    results: Annotated[
        Path | None, typer.Option("--out", metavar="RESULTS.jsonl", help="One line per fact, as it is done.")
    ] = None,
    settings: SetOption = None,
    hparams: HparamsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    chat: ChatOption = False,
    seed: SeedOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace RESULTS.jsonl; the old one becomes RESULTS.jsonl.old.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Edit the facts of a data set and score the edits.

    Scored are the edited questions, their paraphrases, what follows from the edits, and what must not move. Each fact
    is edited on the untouched model unless --sequential is given.
    """
    said = Choice(method, model, hparams, tuple(settings or ()), device, dtype, chat, seed).hparams()
    requests = many_facts(data, limit, layout)
    if results is not None:
        keep_what_is_there(results, force)
        if not results.parent.is_dir():
            raise UsageError(f"There is no folder '{results.parent}' for the results. Make it first, or correct --out.")

    from easyeditor.editors.base import BaseEditor
    from easyeditor.editors.perform import checked
    from easyeditor.editors.progress import tracked
    from easyeditor.editors.summary import summarise

    editor = BaseEditor.from_hparams(said)
    checked(requests, editor.spec)
    with waiting("Loading the model"):
        lm = editor.lm
    stream = editor.stream(requests, sequential_edit=sequential, batch_size=batch or 1)
    records = list(written(tracked(stream, len(requests), f"{said.alg_name} on {lm.name}"), results))
    if results is not None and sequential:
        rewritten(records, results)
    summary = summarise(records)
    if as_json:
        emit({"data": data, "method": said.alg_name, "facts": len(records), "out": results, "scores": summary})
        return
    out().print(scores(summary))
    out().print("Mean and standard error. 'before' is the untouched model, 'after' the model right after its edit.")
    remark_on(editor.spec)


def scores(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A table of means with standard error, number and protocol, one score to a row, one phase to a column."""
    titles = {"pre": "before", "post": "after", "final": "final"}
    phases = [phase for phase in titles if summary.get(phase)]
    rows = []
    for name in dict.fromkeys(name for phase in phases for name in summary[phase]):
        found = {phase: summary[phase][name] for phase in phases if name in summary[phase]}
        last = found[list(found)[-1]]
        means = [_mean(found.get(phase)) for phase in phases]
        rows.append((name, *means, last["n"], last["unscored"] or None, last["protocol"]))
    columns = ("score", *(titles[phase] for phase in phases), "n", "unscored", "protocol")
    return table("", columns, rows, right=columns[1:-1])


def _mean(score: Mapping[str, Any] | None) -> str | None:
    if score is None or score["mean"] is None:
        return None
    error = score["stderr"]
    return f"{score['mean']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def written(records: Iterable[dict[str, Any]], path: Path | None) -> Iterator[dict[str, Any]]:
    """The same records, each written to a file as one line of JSON before the next is made."""
    if path is None:
        yield from records
        return
    if path.exists():
        path.replace(path.with_name(f"{path.name}.old"))
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(line(record))
            file.flush()
            yield record


def rewritten(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write all records once more, now that they hold what was measured on the final model."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(line(record) for record in records), encoding="utf-8")
    temporary.replace(path)


def line(record: dict[str, Any]) -> str:
    """A record as a line of a results file."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
