"""`easyedit data`: which data sets can be read, all about one, and whether a file is sound."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyeditor.cli.common import door, emit, out, table
from easyeditor.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from easyeditor.data.catalogue import DataSet
    from easyeditor.data.files import Loaded
    from easyeditor.requests import EditRequest


@door
def data(
    what: Annotated[
        str | None, typer.Argument(metavar="NAME|check", help="A data set, or 'check'; without it, all are listed.")
    ] = None,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="With 'check': a data file, or a hub id.")] = None,
    layout: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Read FILE as this data set, whatever its fields tell.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the data sets that can be read, show all about one, or check a file.

    'easyedit data check FILE' validates every record and prints the first edit.
    """
    from easyeditor.data.catalogue import DATA_SETS, data_set
    from easyeditor.errors import UsageError

    if what == "check":
        if file is None:
            raise UsageError("'easyedit data check' needs a file. Name a .json, .jsonl or .csv file, or a hub id.")
        _check(file, layout, as_json)
        return
    if file is not None or layout is not None:
        raise UsageError("A file and --as go with 'check': easyedit data check FILE --as NAME.")
    if what is not None:
        _one(data_set(what), as_json)
        return
    sets = sorted(DATA_SETS, key=lambda each: each.name)
    if as_json:
        emit([_facts(each) for each in sets])
        return
    rows = [(each.name, each.task, each.size, each.licence, each.where, each.extra) for each in sets]
    console = out()
    console.print(table("", ("name", "an edit is", "size", "licence", "full files", "extra"), rows))
    console.print("Files need no extra; where 'data' is named, a hub id can stand in the place of a file.")
    console.print("The bundled fact table is 'tinyfacts', its other half 'tinyfacts:tuning'.")


def _facts(found: DataSet) -> dict[str, Any]:
    locality, portability = found.groups
    return {
        "name": found.name,
        "title": found.layout.name,
        "task": found.task,
        "size": found.size,
        "licence": found.licence,
        "full_files": found.where,
        "extra": found.extra,
        "reader": found.reader,
        "locality": locality,
        "portability": portability,
    }


def _one(found: DataSet, as_json: bool) -> None:
    facts = _facts(found)
    if as_json:
        emit(facts)
        return
    cells = [(key.replace("_", " "), ", ".join(v) or None if isinstance(v, tuple) else v) for key, v in facts.items()]
    out().print(table("", ("what", found.name), cells))


def _check(file: str, layout: str | None, as_json: bool) -> None:
    from easyeditor.data.files import load

    loaded = load(file, layout)
    first = loaded.edits[0].request
    if as_json:
        emit({**_counts(loaded), "first": first.to_dict()})
        return
    console = out()
    counts = _counts(loaded)
    console.print(table("", ("what", "found"), ((key.replace("_", " "), _shown(v)) for key, v in counts.items())))
    console.print()
    console.print(table("The first edit", ("field", "value"), _cells(first)))


def _counts(loaded: Loaded) -> dict[str, Any]:
    requests = [edit.request for edit in loaded.edits]
    fields = ("subject", "ground_truth", "target_neg", "rephrase_prompts")
    return {
        "read_as": loaded.data_set.name,
        "records": loaded.records,
        "edits": len(requests),
        **{f"with_{name}": sum(bool(getattr(request, name)) for request in requests) for name in fields},
        "locality": Counter(name for request in requests for name in request.locality),
        "portability": Counter(name for request in requests for name in request.portability),
    }


def _shown(value: Any) -> Any:
    return ", ".join(f"{name} {n}" for name, n in value.items()) or None if isinstance(value, Counter) else value


def _cells(request: EditRequest) -> list[tuple[str, str | None]]:
    cells: list[tuple[str, str | None]] = [
        (name, getattr(request, name)) for name in ("prompt", "subject", "target_new", "ground_truth", "target_neg")
    ]
    cells += [("rephrase_prompt", text) for text in request.rephrase_prompts]
    for kind in ("locality", "portability"):
        for name, probes in getattr(request, kind).items():
            cells += [(f"{kind}.{name}", f"{p.prompt} -> {' | '.join(p.answers) or 'not given'}") for p in probes]
    return cells
