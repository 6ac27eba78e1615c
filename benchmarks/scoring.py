"""Scoring facts with all their probes, before and after an edit, against asking one probe at a time.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --data counterfact.json

CounterFact records (from --data, or counterfact/counterfact.json in the folder that EASYEDITOR_DATA names, else facts
of tinyfacts) on a model of GPT-2-small's shape with random weights. The plain way calls the transformers model itself:
`generate` for every prompt, and one forward pass for every prompt with every answer under which it is read. Both ways
run in turns in one process, and their answers are compared: the texts, the tokens that are likeliest at the places of a
given answer, and its log-probability. Random weights leave ties in the last bit of a number, where a batch may choose
another token than a single row; such answers are counted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from easyeditor.data.files import load_requests
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.lm.model import LM
from easyeditor.metrics.likelihood import Reading, read
from easyeditor.metrics.quality import _pairs, _prompts, compare_locality, quality
from easyeditor.requests import EditRequest
from run import small_gpt2

TOKENS = 24
TINY = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 4096}


def records(data: str | None, count: int) -> list[EditRequest]:
    """The first records of a file, or of tinyfacts."""
    folder = os.environ.get("EASYEDITOR_DATA")
    path = Path(data) if data else Path(folder, "counterfact", "counterfact.json") if folder else None
    return load_requests(path, count) if path else TinyFacts().requests(limit=count)


@dataclass
class Plain:
    """What one probe at a time gives.

    Args:
        texts: Prompt -> free answer.
        readings: Prompt and answer -> how it is read.
        asked: Calls of the model: `generate`, and forward passes.
    """

    texts: dict[str, str] = field(default_factory=dict)
    readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    asked: list[int] = field(default_factory=lambda: [0, 0])


@torch.no_grad()
def plain(lm: LM, requests: Sequence[EditRequest], found: Plain) -> None:
    """Ask every probe of every request by itself, with nothing but transformers."""
    for request in requests:
        for prompt in _prompts(request):
            inputs = lm.tokenizer(prompt, return_tensors="pt")
            ids = lm.model.generate(
                **inputs,
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=lm.text.pad_id,
                eos_token_id=sorted(lm.text.eos_ids),
            )
            said = lm.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            found.texts[prompt] = said.strip().split("\n")[0].strip()
            found.asked[0] += 1
        for prompt, answer in _pairs(request):
            joined, first = lm.text.encode_pair(prompt, answer)
            logits = lm.model(torch.tensor([joined.ids])).logits[0, first - 1 : -1]
            labels = torch.tensor(joined.ids[first:])
            best, logp = logits.argmax(-1), logits.log_softmax(-1).gather(1, labels[:, None])
            accuracy = float((best == labels).float().mean())
            found.readings[prompt, answer] = Reading(tuple(best.tolist()), accuracy, float(logp.mean()))
            found.asked[1] += 1


def small_edit(lm: LM) -> WeightEdit:
    """A change of rank one of one projection."""
    name = lm.mlp_out(len(lm.blocks) // 2).name
    weight = f"{name}.weight" if not name.endswith(".weight") else name
    d_in, d_out = lm.model.get_parameter(weight).shape
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 1, generator=generator) for n in (d_out, d_in))
    return WeightEdit(deltas={weight: LowRank(left, right * 0.02)})


def differing(
    lm: LM, requests: Sequence[EditRequest], scores: list[dict[str, Any]], found: Plain
) -> tuple[int, int, float]:
    """How many texts and how many readings are not the same, and the largest difference of a log-probability."""
    texts = 0
    for request, measured in zip(requests, scores, strict=True):
        groups = [measured, measured["locality"], measured["portability"]]
        said = [
            text for group in groups for key, value in group.items() if key.endswith("_gen_content") for text in value
        ]
        texts += sum(a != found.texts[prompt] for a, prompt in zip(said, _prompts(request), strict=True))
    ours = read(lm, list(found.readings), 64)
    same = [ours[pair].predicted == reading.predicted for pair, reading in found.readings.items()]
    apart = max(abs(ours[pair].log_prob - reading.log_prob) for pair, reading in found.readings.items())
    return texts, same.count(False), apart


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--data", help="a file of records")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether the script runs, not how fast")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    lm = LM.wrap(*small_gpt2(**(TINY if args.tiny else {})))
    requests = records(args.data, args.facts)
    lm.pads_left  # noqa: B018  # one-off: a model is asked once whether padding moves it
    quality(lm, requests[:1], max_new_tokens=2)
    plain(lm, requests[:1], Plain())

    seconds, apart = {"ours": 0.0, "plain": 0.0}, []
    counted = Plain()
    before: list[dict[str, Any]] = []
    for phase in ("before", "after"):
        if phase == "after":
            Ledger.of(lm).apply(small_edit(lm))
        start = time.perf_counter()
        scores = quality(lm, requests, max_new_tokens=TOKENS, batch_size=args.batch_size)
        for old, new in zip(before, scores, strict=False):
            compare_locality(lm, old, new)
        seconds["ours"] += time.perf_counter() - start
        before = before or scores
        found = Plain(asked=counted.asked)
        for request in track(requests, f"plain, {phase}", console=Console(stderr=True)):
            start = time.perf_counter()
            plain(lm, [request], found)
            seconds["plain"] += time.perf_counter() - start
        apart.append(differing(lm, requests, scores, found))

    texts, readings, logp = (
        max(values) if i == 2 else sum(values) for i, values in enumerate(zip(*apart, strict=True))
    )
    shape = "a tiny model" if args.tiny else "GPT-2-small's shape"
    table = Table(
        "measured", "value", title=f"{len(requests)} facts, before and after; {shape}, {args.threads} threads"
    )
    for row in (
        ("free answers asked for", f"{counted.asked[0]}"),
        ("given answers read", f"{counted.asked[1]}"),
        ("one probe at a time, s", f"{seconds['plain']:.1f}"),
        ("ours, s", f"{seconds['ours']:.1f}"),
        ("one at a time over ours", f"{seconds['plain'] / seconds['ours']:.2f}"),
        ("free answers that differ", f"{texts}"),
        ("readings whose likeliest tokens differ", f"{readings}"),
        ("largest difference of a log-probability", f"{logp:.1e}"),
    ):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
