"""`easyedit trace`: causal tracing of a fact, as a heat map of layers by tokens; or its neurons, by layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyeditor.cli import heatmap, neuron_map
from easyeditor.cli.common import door, emit, load, out
from easyeditor.cli.options import ChatOption, DebugOption, DeviceOption, DtypeOption, JsonOption, ModelOption
from easyeditor.errors import UsageError

if TYPE_CHECKING:
    from easyeditor.core.trace import Trace
    from easyeditor.lm.model import LM


@door
def trace(
    prompt: Annotated[str, typer.Option(help="The text in front of the answer.")],
    subject: Annotated[
        str | None, typer.Option(help="The part of the prompt that names the entity; not needed for --neurons.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer whose probability is traced; else the model's own.")
    ] = None,
    model: ModelOption = "tinyfacts",
    samples: Annotated[int, typer.Option(min=1, help="Corrupted copies that are averaged.")] = 10,
    noise: Annotated[float, typer.Option(help="The noise, in standard deviations of the embeddings.")] = 3.0,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Layers restored at once for MLP and attention; else 10, a third if shallow."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Attribute the answer to feed-forward neurons instead.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="With --neurons: steps of the integrated gradients.")] = 20,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --neurons: share of the largest attribution that counts.")
    ] = 0.2,
    picture: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="Where to draw the map as PNG.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    chat: ChatOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show which layers and tokens carry a fact.

    The subject's embeddings are corrupted with noise; then one state at a time is set back to its clean value. The map
    shows how much of the answer's probability each brings back. With --neurons the answer's probability is attributed
    to the feed-forward neurons by integrated gradients.
    """
    from easyeditor.core.trace import trace as traced
    from easyeditor.requests import subject_span

    if picture is not None:
        _drawable(picture)
    if neurons:
        lm = load(model, device, dtype)
        lm.text.chat = chat
        _neurons(lm, model, prompt, target, steps, threshold, picture, as_json)
        return
    if subject is None:
        raise UsageError("Tracing needs --subject, the part of the prompt that names the entity. Or pass --neurons.")
    subject_span(prompt, subject)  # before a model is loaded
    lm = load(model, device, dtype)
    lm.text.chat = chat
    found = traced(
        lm, prompt, subject, target, noise=noise, noise_samples=samples, seed=seed, window=window, watch=watched
    )
    if picture is not None:
        heatmap.save(found, picture)
    if as_json:
        emit({"model": model, "samples": samples, "seed": seed, "out": picture, **_document(found)})
        return
    _print(found, picture)


def watched(jobs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The jobs, with a progress bar on stderr."""
    from easyeditor.editors.progress import tracked

    return tracked(jobs, len(jobs), "Tracing")


def _neurons(
    lm: LM,
    model: str,
    prompt: str,
    target: str | None,
    steps: int,
    threshold: float,
    picture: Path | None,
    as_json: bool,
) -> None:
    """The attribution of an answer, in words, as JSON and as PNG."""
    from easyeditor.core.neurons import attribution, coarse
    from easyeditor.core.question import ANSWER_TOKENS
    from easyeditor.lm.generate import answer

    if not prompt.strip():
        raise UsageError("The prompt is empty. Write the text that the answer follows.")
    said = target if target is not None else answer(lm, [prompt], ANSWER_TOKENS)[0]
    if not said.strip():
        raise UsageError(f"There is no answer to the prompt '{prompt}' to attribute. Name one with --target.")
    found = attribution(lm, lm.rewrite(prompt), said, steps, watch=_layers)
    layers = neuron_map.layers_of(found, coarse(found.scores, threshold))
    if picture is not None:
        neuron_map.save(layers, picture, f"{prompt} [{said.strip()}]")
    if as_json:
        rows = [asdict(layer) for layer in layers]
        told = {"model": model, "prompt": prompt, "answer": said, "probability": found.probability, "steps": steps}
        emit({**told, "threshold": threshold, "out": picture, "layers": rows})
        return
    console = out()
    console.print(f"{prompt} [{said}]", markup=False, soft_wrap=True)
    console.print(f"The mean probability of its tokens is {found.probability:.3f}.", soft_wrap=True)
    neuron_map.draw(console, layers)
    console.print()
    for line in neuron_map.summary(layers, threshold):
        console.print(line, markup=False, soft_wrap=True)
    if picture is not None:
        console.print(f"Drawn in '{picture}'.", markup=False, soft_wrap=True)


def _layers(layers: Sequence[int]) -> Iterator[int]:
    """The layers, with a progress bar on stderr."""
    from easyeditor.editors.progress import tracked

    return tracked(layers, len(layers), "Attributing")


def _drawable(picture: Path) -> None:
    heatmap.need_plots()
    if picture.suffix.lower() != ".png":
        raise UsageError(f"The picture '{picture}' is drawn as PNG. Give it a name that ends in .png.")
    if not picture.parent.is_dir():
        raise UsageError(f"There is no folder '{picture.parent}' for the picture. Make it first, or correct --out.")


def _document(found: Trace) -> dict[str, object]:
    return {
        "prompt": found.prompt,
        "tokens": found.tokens,
        "subject": list(found.subject),
        "answer": found.answer,
        "token": found.token,
        "clean": found.clean,
        "corrupted": found.corrupted,
        "noise": found.noise,
        "window": found.window,
        "effects": {kind: getattr(found, kind).tolist() for kind, *_ in heatmap.PANELS},
    }


def _print(found: Trace, picture: Path | None) -> None:
    console = out()
    console.print(f"{found.prompt} [{found.answer}]", markup=False, soft_wrap=True)
    console.print(
        f"p('{heatmap.shown(found.token)}') is {found.clean:.3f}, and {found.corrupted:.3f} with the subject corrupted "
        f"(noise {found.noise:.3g}).",
        markup=False,
        soft_wrap=True,
    )
    heatmap.draw(console, found)
    console.print("\nTokens with * are the subject; in front of it nothing is corrupted. Largest:")
    for line in heatmap.summary(found):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if found.clean < found.corrupted + 0.1:
        console.print("The noise takes little away from the answer, so that there is little to trace: try --noise.")
    if picture is not None:
        console.print(f"Drawn in '{picture}'.", markup=False, soft_wrap=True)
