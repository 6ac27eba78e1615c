"""UltraEdit and StableEdit on tinyfacts: what 1,000 facts in steps of 100 cost, and the solve against the textbook.

    python benchmarks/gradients.py

Prints a table per method, in fp32: the seconds of all steps, on the clock and of the processor, which are the same on a
machine that does nothing else; of these the forward and backward passes, the solves and the application; the warm-up,
which is done once; and how many of the facts hold at the end, by free generation of a sample. Then the solve:
(H^T H + I)^-1 H^T V by push-through, with as many unknowns as tokens, against a dense solve with as many as inputs,
both fp64; and one attribution to neurons, with its steps in one batch and one by one. Settings are the packaged rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from easyeditor.core.lifelong import ridge
from easyeditor.core.neurons import attribution
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.delta import dense
from easyeditor.edits.ledger import Ledger
from easyeditor.hparams import complete
from easyeditor.lm.clock import listening
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from stream import facts

METHODS = ("UltraEdit", "StableEdit")


def stream_of(name: str, requests: Sequence[EditRequest], step: int, sample: int, given: dict[str, Any]) -> list[str]:
    """The cells of one method."""
    spec = get_method(name)
    hparams = complete(spec.hparams.from_hparams(f"{name}/tinyfacts"), lm := LM.load("tinyfacts", dtype="float32"))
    for key, value in given.items():
        setattr(hparams, key, value)
    start = time.perf_counter()
    state = prepared(lm, spec, hparams)
    warm = time.perf_counter() - start
    start, used = time.perf_counter(), time.process_time()
    with listening() as times:
        for i in range(0, len(requests), step):
            part = requests[i : i + step]
            put_on(lm, make_edit(lm, spec, part, hparams, state), part)
    total, used = time.perf_counter() - start, time.process_time() - used
    asked = requests[:: max(len(requests) // sample, 1)]
    said = answer(lm, [r.prompt for r in asked], 16, 64)
    held = [exact_match(text, [r.target_new]) or 0.0 for text, r in zip(said, asked, strict=True)]
    parts = [f"{times.seconds.get(part, 0.0):.1f}" for part in ("gradients", "solve", "apply")]
    Ledger.of(lm).reset()
    return [
        name,
        f"{total:.1f}",
        "60 at most",
        f"{used:.1f}",
        *parts,
        f"{warm:.1f}",
        f"{sum(held) / len(held):.2f} of {len(held)}",
    ]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of the fastest of some repeats."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def solves(d_in: int, d_out: int, tokens: int, repeats: int) -> list[str]:
    """The cells of one size."""
    generator = torch.Generator().manual_seed(0)
    h, v = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (d_in, d_out))

    def textbook() -> Tensor:
        return torch.linalg.solve(h.T @ h + torch.eye(d_in, dtype=h.dtype), h.T @ v)

    def pushed() -> Tensor:
        return h.T @ torch.cholesky_solve(v, torch.linalg.cholesky(h @ h.T + torch.eye(tokens, dtype=h.dtype)))

    expected = textbook()
    off = float((pushed() - expected).norm() / expected.norm())
    kept = float((dense(ridge(h, v, 1.0)).double() - expected.T).norm() / expected.norm())
    plain, ours = seconds(textbook, repeats), seconds(lambda: ridge(h, v, 1.0), repeats)
    size = f"{d_in} x {d_out}, {tokens} tokens"
    return [size, f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.1f}", f"{off:.1e}", "1e-8 at most", f"{kept:.1e}"]


def neurons(steps: int, repeats: int) -> list[str]:
    """The cells of an attribution, all steps in one batch and one by one."""
    lm = LM.load("tinyfacts", dtype="float32")
    ask = ("The capital of New Zealand is", "Wellington")
    batched, single = (attribution(lm, *ask, steps, batch_tokens=n) for n in (4096, 1))
    off = max(float((a - b).abs().max()) for a, b in zip(batched.scores, single.scores, strict=True))
    times = [seconds(lambda n=n: attribution(lm, *ask, steps, batch_tokens=n), repeats) for n in (4096, 1)]
    return [f"{steps}", f"{times[0]:.2f}", f"{times[1]:.2f}", f"{times[1] / times[0]:.1f}", f"{off:.1e}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--facts", type=int, default=1000, help="at most 2,586")
    parser.add_argument("--step", type=int, default=100, help="facts per edit")
    parser.add_argument("--sample", type=int, default=100, help="how many facts are asked at the end")
    parser.add_argument("--warm-up", type=int, help="made-up facts of the warm-up; else the packaged setting")
    parser.add_argument("--steps", type=int, default=20, help="of the integration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1152, 192, 300, 4096, 1024, 300])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console, requests = Console(width=150), facts(args.facts)
    given = {} if args.warm_up is None else {"warm_up": args.warm_up}
    title = f"{len(requests):,} facts in steps of {args.step}, {args.threads} threads"
    table = Table(
        "method", "s", "target", "CPU, s", "passes, s", "solve, s", "apply, s", "warm-up, s", "held", title=title
    )
    for name in args.methods:
        table.add_row(*stream_of(name, requests, args.step, args.sample, given))
    console.print(table)
    heads = ("dense solve, s", "ours, s", "ratio", "difference in fp64", "target", "as kept in fp32")
    table = Table("H and V", *heads)
    for i in range(0, len(args.sizes), 3):
        table.add_row(*solves(*args.sizes[i : i + 3], repeats=args.repeats))
    console.print(table)
    table = Table("steps", "batched, s", "one by one, s", "ratio", "largest difference")
    table.add_row(*neurons(args.steps, args.repeats))
    console.print(table)


if __name__ == "__main__":
    main()
