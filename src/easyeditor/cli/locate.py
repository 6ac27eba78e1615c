"""`easyedit locate`: which layers to edit in a model, and a settings file that says so."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyeditor.cli.common import door, emit, keep_what_is_there, load, out, table
from easyeditor.cli.facts import many_facts
from easyeditor.cli.options import (
    ChatOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    ModelOption,
)
from easyeditor.errors import UsageError

if TYPE_CHECKING:
    from easyeditor.core.locate import Located
    from easyeditor.lm.model import LM
    from easyeditor.registry import MethodSpec
    from easyeditor.requests import EditRequest

FEW = 10  # facts below which the ranking is called shaky
COLUMNS = ("layer", "effect of MLP", "effect of state", "probability reached", "score", "rank", "chosen")


@door
def locate(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Facts in JSON, JSONL or CSV with ground_truth; else the bundled table's."),
    ] = None,
    layout: LayoutOption = None,
    model: ModelOption = "tinyfacts",
    method: Annotated[str, typer.Option("--method", help="For which method; 'easyedit methods' lists them.")] = "MEMIT",
    facts: Annotated[int, typer.Option(min=1, help="At most this many facts.")] = 20,
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Choose among these only, such as 3-7 or 3,4,9.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of a method that edits several; else 5, a quarter of the model if shallow."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Forward passes of each value optimisation.")] = 15,
    samples: Annotated[int, typer.Option(min=1, help="Corrupted copies that are averaged.")] = 10,
    noise: Annotated[float, typer.Option(help="The noise, in standard deviations of the embeddings.")] = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="Of noise and sampled texts.")] = 0,
    row: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.yaml", help="Where to write the settings file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.yaml if it exists.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    chat: ChatOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rank the layers of a model, and write settings for a method.

    Layers are ranked over facts that the model knows: by how much of a fact passes through the MLPs there (causal
    tracing), and by how far a value written there moves the answer. The settings load with --hparams as they are.
    """
    from easyeditor.core.locate import locate as located
    from easyeditor.editors.progress import tracked
    from easyeditor.registry import get_method

    spec = get_method(method)
    _check(spec, row, force)
    chosen = layers_of(layers) if layers is not None else None
    requests = many_facts(file or "tinyfacts:tuning", facts, layout)
    lm = load(model, device, dtype)
    lm.text.chat = chat
    found = located(
        lm,
        requests,
        chosen,
        noise=noise,
        noise_samples=samples,
        steps=steps,
        width=width,
        seed=seed,
        watch=lambda jobs: tracked(jobs, len(jobs), f"Locating in {model}"),
    )
    settings = _settings(spec, lm, model, found)
    source = (
        f"easyedit locate, {found.facts} facts of {file or 'the bundled table'} that {model} knows; causal tracing "
        f"with {samples} samples of noise {noise:g} sigma, MLPs in windows of {found.window}; values in {steps} steps; "
        f"seed {seed}"
    )
    text = as_yaml(settings, source)
    if row is not None:
        _write(row, text)
    if as_json:
        emit(
            {"model": model, "method": spec.name, **dataclasses.asdict(found), "settings": settings, "out": row}
            | {"source": source, "layers": _edited(settings, found)}
        )
        return
    _print(found, _edited(settings, found))
    if row is None:
        out().print("\n" + text, markup=False, soft_wrap=True)
        out().print("Nothing was written; add --out FILE.yaml to keep these settings.")
        return
    out().print(f"\nSettings of {spec.name} for {model} are in '{row}'. Next:", markup=False, soft_wrap=True)
    for line in _commands(spec, settings, row, requests[0]):
        out().print(f"  {line}", markup=False, soft_wrap=True)


def layers_of(text: str) -> list[int]:
    """The layers in a text such as ``3-7`` or ``3,4,9``.

    Raises:
        UsageError: It is neither.
    """
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()) or (not high and "-" in part):
            raise UsageError(f"--layers '{text}' is no list of layers. Write it such as 3-7 or 3,4,9.")
        found += range(int(low), int(high or low) + 1)
    if not found:
        raise UsageError(f"--layers '{text}' names no layer: write the lower number first, such as 3-7.")
    return found


def as_yaml(settings: dict[str, Any], source: str) -> str:
    """Settings as the text of a settings file, which says where they come from."""
    import yaml

    lines = textwrap.wrap(f"source: {source}", 116)
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)


def _check(spec: MethodSpec, row: Path | None, force: bool) -> None:
    names = {field.name for field in dataclasses.fields(spec.hparams)}
    if not names & {"layers", "inner_params"}:
        raise UsageError(f"{spec.name} edits no layer, so there is none to choose. Name another method with --method.")
    if row is None:
        return
    keep_what_is_there(row, force)
    if row.suffix not in (".yaml", ".yml"):
        raise UsageError(f"The settings file '{row}' is YAML. Give it a name that ends in .yaml.")
    if not row.parent.is_dir():
        raise UsageError(f"There is no folder '{row.parent}' for the settings. Make it first, or correct --out.")


def _settings(spec: MethodSpec, lm: LM, model: str, found: Located) -> dict[str, Any]:
    """The method's own settings for the model, complete, with the layers that were found."""
    from easyeditor.hparams import HyperParams, complete

    names = {field.name for field in dataclasses.fields(spec.hparams)}
    place: dict[str, Any] = {}
    if "layers" in names:
        place["layers"] = found.band if _takes_several(spec) else [found.best]
    else:
        place["inner_params"] = [lm.weight_name(found.best)]
    full = complete(spec.hparams(model_name=model, **place), lm)
    common = {field.name: field.default for field in dataclasses.fields(HyperParams)}
    head = {"alg_name": spec.name, "model_name": model, **place}
    said = {name: value for name, value in full.to_dict().items() if name not in head and value is not None}
    return head | {name: value for name, value in said.items() if name not in common or common[name] != value}


def _takes_several(spec: MethodSpec) -> bool:
    """Whether a method shares an edit over several layers: as its packaged rows do, else as its settings allow."""
    from easyeditor.hparams import preset, preset_rows

    packaged = [preset(spec.name, row)[1].get("layers") or [] for row in preset_rows(spec.name)]
    if packaged:
        return any(len(layers) > 1 for layers in packaged)
    several: dict[str, Any] = {"layers": [0, 1]}
    try:
        spec.hparams(**several).check()
    except UsageError:
        return False
    return True


def _edited(settings: dict[str, Any], found: Located) -> list[int]:
    layers: list[int] = settings.get("layers") or [found.best]
    return layers


def _print(found: Located, layers: Sequence[int]) -> None:
    console = out()
    rows = []
    for r in found.ranked:
        numbers = f"{r.mlp:+.3f}", f"{r.state:+.3f}", f"{r.reached:.3f}", f"{r.score:.3f}"
        rows.append((r.layer, *numbers, r.rank, "*" if r.layer in layers else ""))
    console.print(table("", COLUMNS, rows, right=COLUMNS[:-1]))
    console.print(f"\nMeans over {found.facts} facts that the model knows, at the subject's last token.")
    if found.skipped:
        why = "the model answers them otherwise, or no ground_truth says how"
        console.print(f"{found.skipped} facts were skipped: {why}.", soft_wrap=True)
    if found.facts < FEW:
        console.print(f"So few facts make a shaky ranking: give {FEW} or more that the model knows.")
    chosen = f"layers {', '.join(map(str, layers))}" if len(layers) > 1 else f"layer {layers[0]}"
    alike = "Of layers with scores alike (5 %), the highest is taken"
    console.print(f"Chosen: {chosen}. {alike}: {found.best}{'; a band ends there' if len(layers) > 1 else ''}.")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _commands(spec: MethodSpec, settings: dict[str, Any], row: Path, request: EditRequest) -> list[str]:
    """What to do next: statistics where the method wants them, and an edit."""
    of = f"--method {spec.name} --hparams {shlex.quote(str(row))}"
    asked = {"prompt": request.prompt, "subject": request.subject or "", "target": request.target_new}
    fact = " ".join(f"--{name} {shlex.quote(text)}" for name, text in asked.items())
    if "mom2_dataset" not in settings or settings.get("mom2_adjustment") is False:
        return [f"easyedit edit {of} {fact}"]
    folder = shlex.quote(str(row.with_name(f"{row.stem}-stats")))
    return [f"easyedit stats {of} --out {folder}", f"easyedit edit {of} --set stats_dir={folder} {fact}"]
