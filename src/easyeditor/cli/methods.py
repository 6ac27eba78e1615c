"""`easyedit methods`: what there is, or all about one method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyeditor.cli.common import door, emit, out, table
from easyeditor.cli.notes import settings_of
from easyeditor.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from easyeditor.registry import MethodSpec


@door
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method; without it, all are listed.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the methods, or show all about one.

    Its idea, its equation, its settings, and the models it has settings for.
    """
    from easyeditor.registry import get_method
    from easyeditor.registry import methods as all_methods

    if name is not None:
        _one(get_method(name), as_json)
        return
    specs = list(all_methods().values())
    if as_json:
        emit([_brief(spec) for spec in specs])
        return
    rows = [
        (s.name, s.kind, s.requests, ", ".join(s.needs) or None, s.summary.removeprefix(f"{s.name}: ")) for s in specs
    ]
    out().print(table("", ("method", "changes", "facts per edit", "needs", "what it is"), rows))


def _brief(spec: MethodSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "kind": spec.kind,
        "requests": spec.requests,
        "needs": spec.needs,
        "paper": spec.paper,
        "summary": spec.summary,
    }


def _one(spec: MethodSpec, as_json: bool) -> None:
    from easyeditor.hparams import preset_rows

    settings = settings_of(spec.hparams)
    rows = preset_rows(spec.name)
    if as_json:
        emit({**_brief(spec), "doc": spec.doc, "settings": [each._asdict() for each in settings], "presets": rows})
        return
    console = out()
    console.print(spec.doc, markup=False)
    console.print()
    cells = [(each.name, each.kind, each.default, each.note) for each in settings]
    console.print(table("Settings (--set NAME=VALUE)", ("name", "type", "default", "meaning"), cells))
    console.print()
    packaged = ", ".join(rows) or "no model; layers are chosen by depth"
    console.print(f"Settings are packaged for: {packaged}", markup=False)
