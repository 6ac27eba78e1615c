"""What restricted training costs on a model of GPT-2-small's shape, and what it is worth on tinyfacts.

    python benchmarks/training.py                     # seconds per edit, ours against the plain loop
    python benchmarks/training.py --facts 100 500     # LocFT-BF and the others on tinyfacts, by free generation

The plain loop is the same training with the same steps: the whole model in every step, the head at every position,
torch's Adam on the trained weight itself (FT-M) or on peft's own adapters (LoRA), once as it is and once with the
activations computed again in the backward pass, as EasyEdit trains LoRA. Dropout is off and no loop ends early. The
difference of the losses is the largest over the steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from easyeditor.core.adapters import AdapterTraining, learned, targets
from easyeditor.core.learn import Minibatch
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.perform import make_edit
from easyeditor.edits.ledger import applied
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from run import request, small_gpt2

LAYER, FT_STEPS, LORA_STEPS = 8, 25, 30  # FT's layer by depth; the steps of EasyEdit's files
FT_RATE, LORA_RATE = 2e-5, 1e-3  # small enough that FT-M does not end early
METHODS = ("LocFT-BF", "LoRA")
Losses = list[float]
Clock = Callable[[], float]


def plain_pass(lm: LM, model: Any, asked: EditRequest) -> Tensor:
    """The cross-entropy of the answer's tokens, from the logits of all positions."""
    encoded, first = lm.text.encode_pair(asked.prompt, asked.target_new)
    row = torch.tensor([encoded.ids])
    return cross_entropy(model(input_ids=row).logits[0, first - 1 : -1], row[0, first:])


def plain_loop(parameters: Sequence[Tensor], lr: float, steps: int, loss_of: Callable[[], Tensor]) -> Losses:
    """Adam, step by step."""
    adam, losses = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        loss = loss_of()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def plain_ft(lm: LM, model: GPT2LMHeadModel) -> Losses:
    """FT-M on the weight itself, all others frozen."""
    weight = model.get_parameter(lm.mlp_out(LAYER).weight_name)
    model.requires_grad_(False)
    weight.requires_grad_(True)
    return plain_loop([weight], FT_RATE, FT_STEPS, lambda: plain_pass(lm, model, request()))


def plain_lora(lm: LM, model: GPT2LMHeadModel, again: bool) -> Losses:
    """LoRA by peft, with the first values that ours draws; with or without the activations computed again."""
    import peft

    names = [site.name for site in targets(lm, [])]
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=names, fan_in_fan_out=True)
    adapted, generator = peft.get_peft_model(model, config), torch.Generator().manual_seed(0)
    for name in names:
        first = adapted.base_model.model.get_submodule(name).lora_A["default"].weight
        with torch.no_grad():
            first.uniform_(-1, 1, generator=generator).div_(math.sqrt(first.shape[1]))
    if again:
        adapted.train()
        for module in adapted.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return plain_loop(trained, LORA_RATE, LORA_STEPS, lambda: plain_pass(lm, adapted, request()))


def our_ft(lm: LM) -> Losses:
    """FT-M as the method makes it."""
    spec = get_method("FT")
    hparams = complete(spec.hparams(layers=[LAYER], num_steps=FT_STEPS, lr=FT_RATE), lm)
    return list(spec.run(lm, [request()], hparams, {}, []).notes["losses"])


def our_lora(lm: LM) -> Losses:
    """LoRA as the method makes it, without its early end."""
    training = AdapterTraining("lora", 8, 32, 0.0, LORA_STEPS, LORA_RATE, stop_below=None)
    asked = request()
    batch = Minibatch(lm, [(asked.prompt, asked.target_new)])
    return learned(lm, targets(lm, []), [batch], training)[1]


def timed(work: Callable[[], Losses], repeats: int, clock: Clock) -> tuple[float, Losses]:
    """The median of the seconds, after one run to warm up, and what came out."""
    losses, found = work(), []
    for _ in range(repeats):
        start = clock()
        losses = work()
        found.append(clock() - start)
    return statistics.median(found), losses


def speed(repeats: int, clock: Clock) -> Table:
    """Seconds per edit; the time to copy a model for the plain loops does not count."""
    model, tokenizer = small_gpt2()
    lm = LM.wrap(model, tokenizer, name="gpt2-small-shape")
    rows: list[tuple[str, Callable[[], Losses], list[tuple[str, Callable[[Any], Losses]]]]] = [
        (f"FT-M, block {LAYER}, {FT_STEPS} steps", lambda: our_ft(lm), [("plain loop", lambda m: plain_ft(lm, m))]),
        (
            f"LoRA, all blocks, {LORA_STEPS} steps",
            lambda: our_lora(lm),
            [
                ("plain loop", lambda m: plain_lora(lm, m, False)),
                ("plain loop, activations again", lambda m: plain_lora(lm, m, True)),
            ],
        ),
    ]
    table = Table("training", "ours, s", "against", "s", "over ours", "largest difference of losses")
    for name, ours, others in rows:
        seconds, losses = timed(ours, repeats, clock)
        for what, plain in others:
            found, theirs = [], losses
            for _ in range(repeats + 1):
                fresh = copy.deepcopy(model)
                start = clock()
                theirs = plain(fresh)
                found.append(clock() - start)
            other = statistics.median(found[1:])
            gap = max(abs(a - b) for a, b in zip(losses, theirs, strict=True))
            table.add_row(name, f"{seconds:.2f}", what, f"{other:.2f}", f"{other / seconds:.2f}", f"{gap:.1e}")
    return table


def worth(sizes: Sequence[int], names: Sequence[str], half: str, more: dict[str, Any]) -> Table:
    """Facts learnt in one edit: what the model says then, to the prompts, to other wordings and to other prompts."""
    lm = LM.load("tinyfacts")
    table = Table("method", "facts", "reliability", "generalisation", "locality", "epochs", "s")
    for size in sizes:
        asked = TinyFacts().requests(half, limit=size, per_subject=2)
        near = [(probe, r) for r in asked for probe in r.locality.get("neighborhood", ())[:1]]
        before = answer(lm, [probe.prompt for probe, _ in near], 24, 64)
        for name in names:
            spec = get_method(name)
            hparams = complete(spec.hparams.from_hparams(f"{name}/tinyfacts"), lm)
            for key, value in more.items():
                setattr(hparams, key, value)
            start = time.perf_counter()
            edit = make_edit(lm, spec, asked, hparams, {})
            seconds = time.perf_counter() - start
            with applied(lm, edit):
                said = answer(lm, [r.prompt for r in asked], 24, 64)
                other = answer(lm, [r.rephrase_prompts[0] for r in asked], 24, 64)
                after = answer(lm, [probe.prompt for probe, _ in near], 24, 64)
            shares = (
                statistics.mean((exact_match(a, [r.target_new]) or 0.0) for a, r in zip(said, asked, strict=True)),
                statistics.mean((exact_match(a, [r.target_new]) or 0.0) for a, r in zip(other, asked, strict=True)),
                statistics.mean(a == b for a, b in zip(before, after, strict=True)),
            )
            epochs = len(edit.notes["losses"])
            table.add_row(name, str(len(asked)), *(f"{x:.3f}" for x in shares), str(epochs), f"{seconds:.1f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-seconds", action="store_true", help="count those, where other work runs as well")
    parser.add_argument("--facts", type=int, nargs="*", help="measure what it is worth for so many facts in one edit")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--half", default="reporting", choices=("reporting", "tuning"))
    parser.add_argument("--set", nargs="*", default=[], help="settings to try, as name=value")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    more = {name: literal(value) for name, _, value in (pair.partition("=") for pair in args.set)}
    Console(width=140).print(
        worth(args.facts, args.methods, args.half, more) if args.facts else speed(args.repeats, clock)
    )


def literal(text: str) -> Any:
    """A number, a list or a text."""
    import yaml

    return yaml.safe_load(text)


if __name__ == "__main__":
    main()
