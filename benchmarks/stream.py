"""A stream of facts, one edit per fact, all of which stay: what an edit costs at its beginning and at its end.

    python benchmarks/stream.py

MEMIT with a history and AlphaEdit on tinyfacts, with its packaged settings. Prints one table: the mean seconds per edit
of the first and of the last hundred, and their ratio; on stderr, those of every hundred. Nothing is scored. Facts of
all subjects come in a drawn order, so that both ends hold the same kind of facts. Most of the time is that of the value
optimisation, which ends when it has found a value; so the mean steps of both ends and the ratio per step are given too.
A fact that the model has by then (its value stays at zero) and one whose edit fails are counted and have no part in
the means.

On a machine that does other work too, take the seconds of this process alone: ``--clock cpu --threads 1``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.base import BaseEditor
from easyeditor.errors import EditDidNothing, EditFailed
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest

METHODS = ("MEMIT", "AlphaEdit")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Stream:
    """What a stream took.

    Args:
        seconds: Of each edit in its order; None for a fact that has none.
        steps: Of its value optimisation.
        had: Facts that the model had already.
        failed: Facts whose edit failed.
    """

    seconds: list[float | None] = field(default_factory=list)
    steps: list[int | None] = field(default_factory=list)
    had: int = 0
    failed: int = 0


def facts(n: int) -> list[EditRequest]:
    """So many facts, no more of one subject than it takes, in a drawn order."""
    table = TinyFacts()
    for per_subject in (1, 2, 4, None):
        found = table.requests(per_subject=per_subject)
        if len(found) >= n:
            break
    rng = Random(0)
    return [request for _, _, request in sorted((rng.random(), i, request) for i, request in enumerate(found))][:n]


def stream(
    name: str, requests: Sequence[EditRequest], clock: Callable[[], float], ends: int, **given: int | None
) -> Stream:
    """Edit fact after fact.

    Args:
        name: The method.
        requests: The facts.
        clock: Tells the seconds.
        ends: After how many edits their mean is told.
        **given: Settings in place of the packaged ones, where they are not None.
    """
    hparams: Any = get_method(name).hparams.from_hparams(f"{name}/tinyfacts")
    hparams.history = True
    for setting, value in given.items():
        if value is not None:
            setattr(hparams, setting, value)
    editor, out = BaseEditor.from_hparams(hparams), Stream()
    editor.rollback(editor.apply(requests[:1])[0])  # statistics, contexts and the factor of lambda C
    console = Console(stderr=True)
    for done, request in enumerate(track(requests, name, transient=True, console=console), 1):
        start = clock()
        try:
            (edit,) = editor.apply([request])
        except EditDidNothing:
            out.had += 1
        except EditFailed:
            out.failed += 1
        else:
            out.seconds.append(clock() - start)
            out.steps.append(len(edit.notes["losses"][0]))
        if len(out.seconds) < done:
            out.seconds.append(None)
            out.steps.append(None)
        if done % ends == 0:
            console.print(f"{name}, {done} facts: {mean(out.seconds[-ends:]):.3f} s per edit", highlight=False)
    return out


def mean(found: Sequence[float | int | None]) -> float:
    """Of those that are there."""
    known = [each for each in found if each is not None]
    return statistics.fmean(known) if known else float("nan")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--edits", type=int, default=1000, help="how many facts, at most 2,586")
    parser.add_argument("--ends", type=int, default=100, help="how many at either end are compared")
    parser.add_argument("--steps", type=int, help="of the value optimisation, at most; else the packaged setting")
    parser.add_argument("--tokens", type=int, help="of the second moment, at most; else ten per dimension")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="seconds of the clock, or of this process")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    requests = facts(args.edits)
    ends = min(args.ends, len(requests))
    heads = ["method", f"s per edit, first {ends}", f"last {ends}", "last / first", "target", "steps", "ratio per step"]
    heads += ["edits", "known already", "failed"]
    table = Table(*heads, title=f"{len(requests):,} facts in a stream, {args.threads} threads, {args.clock} time")
    for name in args.methods:
        found = stream(name, requests, CLOCKS[args.clock], ends, v_num_grad_steps=args.steps, mom2_tokens=args.tokens)
        first, last = mean(found.seconds[:ends]), mean(found.seconds[-ends:])
        before, after = mean(found.steps[:ends]), mean(found.steps[-ends:])
        edits = len(requests) - found.had - found.failed
        ratios = f"{last / first:.2f}", f"{last / first * before / after:.2f}"
        cells = (f"{first:.3f}", f"{last:.3f}", ratios[0], "1.2 at most", f"{before:.1f}; {after:.1f}", ratios[1])
        table.add_row(name, *cells, str(edits), str(found.had), str(found.failed))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
