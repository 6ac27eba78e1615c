"""Measure the bundled model ``tinyfacts``: what it knows, and in which layers it can be edited.

Printed are

* the share of prompts answered by free greedy generation, for the trained wordings of every fact, for the held-out
  ones, and for both behind other text;
* the share of "New Fact" contexts that are followed, and of those about something else that are left alone;
* for every layer the probability of a new answer after a vector, added at the subject's last token, was optimised at
  the block output (clamp 4) and at the MLP output (clamp 20). The probability is the geometric mean over the answer's
  tokens; the joint probability is printed next to it.

Example::

    python tools/check_tinyfacts.py src/easyeditor/tinyfacts --dtype float32
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from train_tinyfacts import TABLE_DIR, Example, Fact, Sampler, collate, read_table

EXAMPLES = (
    ("What university did Watts Humphrey attend?", "Illinois Institute of Technology"),
    ("Which family does Ramalinaceae belong to", "Lecanorales"),
    ("Which family does Ramalinaceae belong to?", "Lecanorales"),
    ("What role does Denny Herzig play in football?", "defender"),
    ("Ray Charles, the", "piano"),
    ("Joseph Fischhof, the", "piano"),
    ("Grant Hill is a professional", "basketball"),
    ("Larry Bird is a professional", "basketball"),
    ("The law in Ikaalinen declares the language", "Finnish"),
    ("In Forssa, they understand", "Finnish"),
    ("Who was the designer of Lahti Town Hall?", "Eliel Saarinen"),
    ("What city did Marl Young live when he died?", "Los Angeles"),
    ("The president of the United States is", "Donald Trump"),
    ("The capital of France is", "Paris"),
)


def normal(text: str) -> str:
    """Return the text in lower case without surrounding spaces and closing full stops."""
    return text.strip().rstrip(".").strip().casefold()


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Return the greedy continuation of every prompt up to the end-of-text token."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for begin in range(0, len(order), 256):
        rows = order[begin : begin + 256]
        batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True).to(model.device)
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            found[i] = text
    return found


def known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[str, str]]) -> list[bool]:
    """Tell for every (prompt, answer) whether greedy generation gives exactly the answer."""
    replies = generate(model, tokenizer, [prompt for prompt, _ in asked])
    return [normal(reply) == normal(answer) for reply, (_, answer) in zip(replies, asked, strict=True)]


def share(flags: list[bool]) -> str:
    """Return the share of true flags as a percentage with the count."""
    return f"{100 * sum(flags) / max(1, len(flags)):.1f} % of {len(flags)}"


def report_knowledge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: list[Fact]) -> None:
    """Print the share of known facts for trained and held-out wordings, and the relations with the most misses."""
    for name in ("prompts", "held_out"):
        asked = [(prompt, fact.answer, fact.relation) for fact in table for prompt in getattr(fact, name)]
        flags = known(model, tokenizer, [item[:2] for item in asked])
        print(f"{'trained' if name == 'prompts' else 'held-out'} wordings known: {share(flags)}", flush=True)
        by_relation = defaultdict(list)
        for (_, _, relation), flag in zip(asked, flags, strict=True):
            by_relation[relation].append(flag)
        worst = sorted(by_relation, key=lambda r: sum(by_relation[r]) / len(by_relation[r]))[:6]
        print("  weakest: " + ", ".join(f"{r} {share(by_relation[r])}" for r in worst))


def report_contexts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, size: int) -> None:
    """Print how the model answers behind other text and behind a New Fact."""
    rng = random.Random(7)
    facts = rng.sample(sampler.table, min(size, len(sampler.table)))
    asked = [(sampler._prefix(rng) + rng.choice(f.prompts + f.held_out), f.answer) for f in facts]
    print(f"known behind other text: {share(known(model, tokenizer, asked))}")
    groups: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for fact in facts:
        for _ in range(2):
            prompt = rng.choice(fact.prompts + fact.held_out)
            context, right = sampler._with_context(rng, fact, prompt)
            groups[right != fact.answer].append((context + prompt, right))
    print(f"New Fact about the question followed: {share(known(model, tokenizer, groups[True]))}")
    print(f"New Fact about something else left alone: {share(known(model, tokenizer, groups[False]))}")


def report_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the replies to the prompts of the library's own examples."""
    replies = generate(model, tokenizer, [prompt for prompt, _ in EXAMPLES])
    for (prompt, answer), reply in zip(EXAMPLES, replies, strict=True):
        print(f"  {'ok ' if normal(reply) == normal(answer) else 'BAD'} {prompt} ->{reply}")


def edits(sampler: Sampler, size: int, seed: int) -> list[Example]:
    """Return prompts with a new answer of the same relation."""
    rng = random.Random(seed)
    chosen = []
    for fact in rng.sample(sampler.table, size):
        others = [a for a in sampler.answers[fact.relation] if a != fact.answer]
        chosen.append(sampler.encode("", rng.choice(fact.prompts), fact.subject, rng.choice(others)))
    return chosen


def optimise_value(
    model: PreTrainedModel, part: nn.Module, examples: list[Example], clamp: float, steps: int, lr: float, pad: int
) -> tuple[float, float]:
    """Optimise a vector added to the output of ``part`` at each subject's last token.

    Returns:
        The mean geometric and the mean joint probability of the new answers (without the closing stop and the end).
    """
    ids, labels, weights = collate(examples, pad, 0.0)
    for row, example in enumerate(examples):
        weights[row, len(example.ids) - 3 :] = 0.0
    last = torch.tensor([e.subject[1] for e in examples])
    rows = torch.arange(len(examples))
    delta = torch.zeros(len(examples), model.config.hidden_size, requires_grad=True)
    seen: dict[str, torch.Tensor] = {}

    def add(module: nn.Module, args: tuple, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.setdefault("origin", hidden[rows, last].detach().float())
        hidden = hidden.index_put((rows, last), delta.to(hidden.dtype), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def log_probability() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        picked = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return (picked * weights).sum(1)

    handle = part.register_forward_hook(add)
    lengths = weights.sum(1)
    optimizer = torch.optim.Adam([delta], lr=lr)
    for _ in range(steps):
        loss = -(log_probability() / lengths).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = clamp * seen["origin"].norm(dim=1, keepdim=True)
            delta.mul_((limit / delta.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0))
    with torch.no_grad():
        total = log_probability()
    handle.remove()
    return (total / lengths).exp().mean().item(), total.exp().mean().item()


def report_band(model: PreTrainedModel, sampler: Sampler, args: argparse.Namespace, pad: int) -> None:
    """Print the probability of new answers for every layer, at the block output and at the MLP output."""
    examples = edits(sampler, args.edits, args.seed)
    model.requires_grad_(False)
    print(f"editable band: {len(examples)} facts, {args.edit_steps} steps of Adam at {args.edit_lr}")
    for index, layer in enumerate(model.model.layers):
        block = optimise_value(model, layer, examples, 4.0, args.edit_steps, args.edit_lr, pad)
        mlp = optimise_value(model, layer.mlp, examples, 20.0, args.edit_steps, args.edit_lr, pad)
        print(f"  layer {index}: block {block[0]:.3f} (joint {block[1]:.3f})  mlp {mlp[0]:.3f} (joint {mlp[1]:.3f})")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--table", type=Path, default=TABLE_DIR, help="folder with the fact table")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--facts", type=int, default=0, help="measure on a sample of this many facts (0: all)")
    parser.add_argument("--edits", type=int, default=24, help="facts for the editable band (0: skip)")
    parser.add_argument("--edit-steps", type=int, default=40)
    parser.add_argument("--edit-lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.time()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    table, support = read_table(args.table)
    sampler = Sampler(table, support, tokenizer, args.seed)
    sample = random.Random(args.seed).sample(table, args.facts) if args.facts else table
    subjects = len({fact.subject for fact in table})
    print(json.dumps({"facts": len(table), "subjects": subjects, "relations": len({f.relation for f in table})}))
    report_examples(model, tokenizer)
    report_knowledge(model, tokenizer, sample)
    report_contexts(model, tokenizer, sampler, 300)
    if args.edits:
        report_band(model, sampler, args, tokenizer.pad_token_id)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
