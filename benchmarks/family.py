"""MEMIT and AlphaEdit on a model of GPT-2-small's shape with random weights: nothing is downloaded.

    python benchmarks/family.py

Prints tables per method: the seconds of a single edit; those per fact of a batch, for values, keys, solve and apply,
each next to its arithmetic floor, which is the operations counted over the rate of a large product (fp32; fp64 for the
solve), and next to the same matrix products timed alone; and what an edit needs of memory over the loaded model.
``apply`` is the change of the weights and the pass that checks it, ``record`` are an edit's health and fingerprints.

Statistics come from the bundled prose; they, the sampled contexts, the factor of lambda C and the null space are made
once per model and not counted. Values take all their steps: the loss at which they would stop is set to zero.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from easyeditor.core.closed_form import find, finished, least_squares, past_keys, to_last_block, value_settings
from easyeditor.core.prompts import Fact, facts_of
from easyeditor.core.rows import batch_of
from easyeditor.core.solve import NullSpace, Solution, System
from easyeditor.core.spread import Reader, spread
from easyeditor.core.values import groups
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.health import health
from easyeditor.edits.ledger import Ledger, fingerprints
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import MethodSpec, get_method
from easyeditor.requests import EditRequest
from run import STEPS, median, operations, products_alone, rate, small_gpt2, status

METHODS = ("MEMIT", "AlphaEdit")
LAYERS, LENGTHS = [3, 4, 5, 6, 7], [[10, 5]]
TINY = {"n_layer": 4, "n_embd": 32, "n_head": 2}

FIRST_NAMES = (
    "Danielle Corinne Ulrich Matteo Severine Ludovic Ottilie Casimir Philippa Gregor Annelise Thaddeus Marguerite "
    "Florian Rosalind Anselm Beatrix Leopold Henrike Dorian Isolde Valentin Mathilde Konrad Eleonore Fabrice Wilhelma "
    "Raphael Clothilde Benedikt Seraphine Alaric Genevieve Lorenz Antonia Hadrian Celestine Matthias Ottoline Ruprecht"
)
LAST_NAMES = (
    "Darrieux Vandermolen Kestrelli Oudinard Brackwell Thornquist Melisande Fauconnier Gravelotte Hollenbeck "
    "Castellane Winterbourne Sauvageot Lindqvister Montclaire Pellegrand Ravensburg Delacourte Eschenbach Quimperle "
    "Vossberger Tremontier Aldersonne Bellefontaine Zellwegger"
)
LANGUAGES = (
    "English French German Spanish Italian Dutch Danish Swedish Polish Czech Greek Turkish Arabic Hebrew Persian Hindi "
    "Russian Latin Finnish Irish Welsh Scottish Chinese Japanese Korean Thai Malay Basque Catalan Romanian Bulgarian "
    "Serbian Croatian Hungarian Estonian Latvian Lithuanian Ukrainian Georgian Armenian Mongolian Tibetan Bengali "
    "Tamil Urdu Nepali Swahili Zulu Somali Maltese"
)


def made_up(n: int) -> list[EditRequest]:
    """Facts about people who are not; up to 50 with as many different answers, up to 1,000 different people."""
    first, last, languages = FIRST_NAMES.split(), LAST_NAMES.split(), LANGUAGES.split()
    people = [f"{first[(i + turn) % len(first)]} {name}" for turn in range(len(first)) for i, name in enumerate(last)]
    return [
        EditRequest(f"The mother tongue of {person} is", languages[i % len(languages)], subject=person)
        for i, person in enumerate(people[:n])
    ]


@dataclass(frozen=True)
class Method:
    """A method on a model, ready to edit."""

    lm: LM
    spec: MethodSpec
    hparams: Any
    state: Any

    @property
    def systems(self) -> list[System]:
        """What each block's update is solved with."""
        return list(self.state["systems"].values())

    @property
    def sites(self) -> list[Site]:
        """The projections that are written."""
        return [self.lm.mlp_out(layer) for layer in self.hparams.layers]


@dataclass(frozen=True)
class Rates:
    """Operations per second of a large product in fp32 and in fp64."""

    single: float
    double: float


@dataclass
class Cost:
    """Seconds, and of what they are made: operations over a rate, and the products alone."""

    seconds: float
    floor: float | None = None
    alone: float | None = None

    def cells(self, facts: int, target: str = "") -> list[str]:
        """Seconds per fact; each bound per fact and the seconds over it."""
        over = [f"{self.seconds / bound:.2f}" if bound else "" for bound in (self.floor, self.alone)]
        floors = [f"{bound / facts:.4f}" if bound else "" for bound in (self.floor, self.alone)]
        return [f"{self.seconds / facts:.4f}", floors[0], over[0], target, floors[1], over[1]]


def method_on(lm: LM, name: str, folder: str, tiny: bool) -> Method:
    """A method with GPT-2 XL's settings, at blocks 3 to 7 and with statistics from the bundled prose."""
    spec = get_method(name)
    hparams = spec.hparams(
        layers=[1, 2] if tiny else LAYERS,
        v_num_grad_steps=STEPS,
        context_template_length_params=LENGTHS,
        mom2_dataset="texts",
        mom2_update_weight=20_000.0,
        stats_dir=folder,
    )
    full = complete(hparams, lm)
    method = Method(lm, spec, full, prepared(lm, spec, full))
    for system in method.systems:  # the factor, where there is one
        system.inverse_times(torch.zeros(system.size, 1, dtype=torch.float64))
    return method


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def whole(method: Method, requests: Sequence[EditRequest]) -> tuple[float, int]:
    """Seconds of an edit as the editor makes it, from the request to the changed model, and its steps."""
    lm = method.lm

    def edit() -> WeightEdit:
        made = make_edit(lm, method.spec, requests, method.hparams, method.state)
        put_on(lm, made, requests)
        return made

    seconds, made = clock(edit)
    Ledger.of(lm).undo(made.id)
    return seconds, min(len(losses) for losses in made.notes["losses"])


def pieces(method: Method, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Seconds of the parts of an edit, made as the method makes it."""
    lm, hparams = method.lm, method.hparams
    settings = dataclasses.replace(value_settings(hparams), stop_loss=0.0)
    values, found = clock(lambda: find(lm, requests, hparams, method.state, hparams.layers[-1], settings))
    assert all(len(value.losses) == STEPS for value in found.values)
    keys, _ = clock(lambda: read(method, found.facts))
    solver, spent = least_squares(method.state, past_keys([])), []

    def timed(site: Site, k: Tensor, residuals: Tensor) -> Solution:
        seconds, solution = clock(lambda: solver(site, k, residuals))
        spent.append(seconds)
        return solution

    write = to_last_block(lm, hparams.layers, found.targets())
    spreading, written = clock(lambda: spread(lm, found.facts, hparams.layers, [write], timed))
    edit = finished(written, found, hparams)
    putting, edit_id = clock(lambda: put_on(lm, edit, requests))
    Ledger.of(lm).undo(edit_id)
    drafts = max(spreading - keys - sum(spent), 0.0)  # what is written so far goes on and comes off
    record, _ = clock(lambda: (health(lm, edit), fingerprints(lm, edit)))
    return {"values": values, "keys": keys, "solve": sum(spent), "apply": drafts + putting, "record": record}


def read(method: Method, facts: Sequence[Fact]) -> Reader:
    """The passes that read keys and states, as `spread` makes them."""
    lm, layers = method.lm, method.hparams.layers
    reader = Reader(lm, facts)
    for layer, site in zip(layers, method.sites, strict=True):
        reader.read([site], [lm.blocks[layers[-1]]], layers[-1], record_at=layer)
    return reader


def values_floor(method: Method, requests: Sequence[EditRequest], speed: float) -> tuple[float, float]:
    """Operations over the rate, and the products alone, batch by batch as the optimisation makes them."""
    lm, top = method.lm, method.hparams.layers[-1]
    facts = facts_of(requests, method.state["contexts"])
    batches = [batch_of(lm, [facts[i] for i in group]) for group in groups(lm, facts)]
    work = sum(operations(lm, batch, top) for batch in batches)
    return work / speed, sum(products_alone(lm, batch, top) for batch in batches)


def keys_floor(method: Method, requests: Sequence[EditRequest], speed: float) -> tuple[float, float]:
    """The first pass runs all blocks up to the top one, each later one the blocks from the last one written."""
    lm, layers = method.lm, method.hparams.layers
    runs = layers[-1] + 1 + sum(layers[-1] + 1 - layer for layer in layers[:-1])
    weights = [p.detach() for p in lm.blocks[0].parameters() if p.dim() > 1]
    chunks = Reader(lm, facts_of(requests, method.state["contexts"])).chunks
    work = runs * 2 * sum(w.numel() for w in weights) * sum(int(chunk.mask.sum()) for chunk in chunks)
    alone = 0.0
    for chunk in chunks:
        for weight in weights:
            x = torch.randn(chunk.ids.numel(), weight.shape[0])
            alone += runs * median(lambda a=x, b=weight: a @ b, 3)
    return work / speed, alone


def solve_floor(method: Method, n: int, speed: float) -> tuple[float, float]:
    """Two triangular systems or a projection, then products with the keys, all in fp64."""
    work = alone = 0.0
    for site, system in zip(method.sites, method.systems, strict=True):
        d, out = site.d_in, method.lm.width
        large = (d, d)
        count = 2.0 * d * d * n
        if isinstance(system.project, NullSpace):
            large = tuple(system.project.basis.shape)
            count = 4.0 * large[0] * large[1] * n
        work += count + 4.0 * d * n * n + 4.0 * out * n * n + n**3 / 3
        a, k = torch.randn(large, dtype=torch.float64), torch.randn(d, n, dtype=torch.float64)
        r, small = torch.randn(out, n, dtype=torch.float64), torch.randn(n, n, dtype=torch.float64)
        if isinstance(system.project, NullSpace):
            along = torch.randn(large[1], n, dtype=torch.float64)
            alone += median(lambda a=a, k=k: a.T @ k, 3) + median(lambda a=a, x=along: a @ x, 3)
        else:
            alone += median(lambda a=a, k=k: a @ k, 3)
        alone += 2 * median(lambda k=k: k.T @ k, 3) + 2 * median(lambda r=r, s=small: r @ s, 3)
    return work / speed, alone


def apply_floor(method: Method, n: int, speed: float) -> tuple[float, float]:
    """D of each block as a matrix: once for the edit, and once for the blocks above to see it."""
    times = 2 * len(method.sites) - 1
    d, out = method.sites[0].d_in, method.lm.width
    left, right = torch.randn(out, n), torch.randn(d, n)
    return times * 2.0 * d * out * n / speed, times * median(lambda: left @ right.T, 5)


def costs(method: Method, requests: Sequence[EditRequest], rates: Rates, repeats: int) -> dict[str, Cost]:
    """The parts of an edit, the medians of some, each with its floors."""
    n = len(requests)
    found = [pieces(method, requests) for _ in range(repeats)]
    floors = {
        "values": values_floor(method, requests, rates.single),
        "keys": keys_floor(method, requests, rates.single),
        "solve": solve_floor(method, n, rates.double),
        "apply": apply_floor(method, n, rates.single),
    }
    seconds = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return {name: Cost(each, *floors.get(name, ())) for name, each in seconds.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes: of the model, of the method's state, that an edit needs over both, and of what it keeps."""

    model: int
    state: int
    peak: int
    keys: int
    residuals: int
    edit: int


def memory(name: str, n: int, folder: str, tiny: bool, threads: int) -> Memory:
    """What an edit of so many facts needs; for a process of its own. Linux only."""
    torch.set_num_threads(threads)
    lm = model(tiny)
    method = method_on(lm, name, folder, tiny)
    whole(method, made_up(1))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed hides what is needed
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    edit = make_edit(lm, method.spec, made_up(n), method.hparams, method.state)
    put_on(lm, edit, made_up(n))
    return Memory(
        size(lm.model.parameters()),
        size(held(method.state)),
        status("VmHWM") - before,
        size(edit.keys.values()),
        size(edit.residuals.values()),
        size(edit.tensors().values()),
    )


def held(thing: Any) -> list[Tensor]:
    """The tensors that a state holds."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, System | NullSpace):
        return held(list(vars(thing).values()))
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    return [tensor for each in inside for tensor in held(each)]


def size(tensors: Any) -> int:
    """Their bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def apart(*args: Any) -> Memory | None:
    """`memory` in a new process; None where the system does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory, *args).result()


def model(tiny: bool) -> LM:
    return LM.wrap(*small_gpt2(**(TINY if tiny else {})), name="gpt2-shape")


def method_rows(table: Table, name: str, method: Method, args: argparse.Namespace) -> None:
    """A single edit as a whole, then one fact and a batch by their parts."""
    for n, repeats in {1: args.repeats, args.facts: 1}.items():
        facts = f"{name}, {n} {'fact' if n == 1 else 'facts'}"
        if n == 1:
            whole(method, made_up(1))
        seconds, steps = sorted(whole(method, made_up(n)) for _ in range(repeats))[repeats // 2]
        target = "4 s at most" if (name, n, args.tiny) == ("MEMIT", 1, False) else ""
        table.add_row(f"{facts}: the whole edit, {steps} steps", *Cost(seconds).cells(n, target))
        side = 256 if args.tiny else 2048
        rates = Rates(rate(side), rate(side, torch.float64))
        for part, cost in costs(method, made_up(n), rates, repeats).items():
            target = "1.5 at most" if part == "values" and n > 1 and not args.tiny else ""
            table.add_row(f"{facts}: {part}", *cost.cells(n, target))
        speeds = f"{rates.single / 1e9:.0f}; {rates.double / 1e9:.0f}"
        table.add_row("  rates in fp32 and fp64, GFLOP/s", speeds, end_section=True)


def memory_rows(table: Table, name: str, n: int, found: Memory | None) -> None:
    """What an edit needs over the loaded model and the method's state, and what it keeps."""
    if found is None:
        table.add_row(f"{name}, peak of a batch of {n}", "not measured")
        return
    table.add_row(f"{name}, batch of {n}: peak over model and state", f"{found.peak / 1e6:.0f}")
    table.add_row("  keys and residuals in it", f"{(found.keys + found.residuals) / 1e6:.1f}")
    table.add_row("  all that the edit keeps", f"{found.edit / 1e6:.1f}")
    table.add_row("  model; state", f"{found.model / 1e6:.0f}; {found.state / 1e6:.0f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--facts", type=int, default=50, help="facts of the batch, up to 1,000")
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 50], help="batches whose peak memory is measured")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--repeats", type=int, default=3, help="of single edits; batches are measured once")
    parser.add_argument("--tiny", action="store_true", help="a model of four small blocks, to try the script")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = "Four small blocks" if args.tiny else "GPT-2-small's shape"
    title = f"{shape}, fp32, {args.threads} threads, {STEPS} steps, 6 contexts"
    heads = ("measured", "s per fact", "floor, s", "over it", "target", "own products, s", "over them")
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        lm = model(args.tiny)
        for name in args.methods:
            table = Table(*heads, title=title)
            method_rows(table, name, method_on(lm, name, folder, args.tiny), args)
            console.print(table)
            table = Table("measured", "MB")
            for n in args.memory:
                memory_rows(table, name, n, apart(name, n, folder, args.tiny, args.threads))
            if args.memory:
                console.print(table)


if __name__ == "__main__":
    main()
