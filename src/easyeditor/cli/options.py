"""The options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MethodOption = Annotated[str, typer.Option("--method", help="The method; 'easyedit methods' lists them.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A model folder, a hub id, or 'tinyfacts'.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to put the model: 'cpu', or the number of an accelerator.")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else that of the checkpoint.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Go through the model's chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and more log lines.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method. Repeatable.")
]
LoadedModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A model folder or a hub id.  [default: tinyfacts]")
]
HparamsOption = Annotated[
    Path | None, typer.Option("--hparams", metavar="PATH", help="A settings file, or METHOD/MODEL.")
]
LayoutOption = Annotated[
    str | None,
    typer.Option("--as", metavar="NAME", help="Read the file as this data set, of those that 'easyedit data' lists."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="For whatever the method draws.")]
