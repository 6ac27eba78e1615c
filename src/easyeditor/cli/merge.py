"""`easyedit merge`: a plain transformers folder with the edits in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from easyeditor.cli.common import door, emit, keep_what_is_there, load, out, put_on, saved
from easyeditor.cli.options import DebugOption, DeviceOption, DtypeOption, JsonOption, ModelOption


@door
def merge(
    edits: Annotated[list[str], typer.Option("--edits", metavar="DIR", help="A saved edit. Repeatable, in order.")],
    into: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to write.")],
    model: ModelOption = "tinyfacts",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, and put edits on a base they were not made for.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model with its edits as a plain transformers folder.

    The folder loads without this library. Only edits that change weights can be merged.
    """
    from easyeditor.edits.store import merge as write

    keep_what_is_there(into, force)
    changes = saved(edits)
    lm = load(model, device, dtype)
    put_on(lm, changes, force)
    write(lm, into, force)
    if as_json:
        emit({"model": model, "edits": edits, "applied": len(changes), "out": into})
        return
    out().print(f"{len(changes)} edit(s) of {', '.join(edits)} merged into '{into}'. It loads with transformers:")
    out().print(f"  AutoModelForCausalLM.from_pretrained('{into}')", markup=False)
