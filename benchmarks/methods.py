"""What each method is worth on tinyfacts: facts of the reporting half, one at a time, by free generation.

    python benchmarks/methods.py --facts 100

Settings are the packaged rows, which were tuned on the other half of the subjects.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.base import BaseEditor
from easyeditor.editors.summary import summarise
from easyeditor.registry import methods

COLUMNS = {
    "reliability": "rewrite_gen",
    "generalisation": "rephrase_gen",
    "locality, neighbours": "locality.neighborhood_gen",
    "locality, same subject": "locality.same_subject_gen",
    "ES": "probability.ES",
    "PS": "probability.PS",
    "NS": "probability.NS",
}


def main() -> None:
    """Edit, score, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--half", default="reporting", choices=("reporting", "tuning"))
    parser.add_argument("--methods", nargs="*", default=list(methods()))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the scores as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    requests = TinyFacts().requests(args.half, limit=args.facts)
    table = Table("method", *COLUMNS, "s per edit", "s per fact with scoring")
    found = {}
    for name in args.methods:
        spec = methods()[name]
        editor = BaseEditor.from_hparams(spec.hparams.from_hparams(f"{name}/tinyfacts"))
        start = time.perf_counter()
        records = list(editor.stream(requests))
        seconds = (time.perf_counter() - start) / len(requests)
        scores = summarise(records)["post"]
        found[name] = scores
        cells = [f"{scores[key]['mean']:.3f} ± {scores[key]['stderr']:.3f}" for key in COLUMNS.values()]
        table.add_row(name, *cells, f"{sum(r['time'] for r in records) / len(records):.2f}", f"{seconds:.2f}")
    Console(width=170).print(table)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
