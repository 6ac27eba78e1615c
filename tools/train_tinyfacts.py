"""Train the bundled model ``tinyfacts`` from scratch on the fact table of this repository.

The run is seeded and resumable: every few minutes the state is written to ``OUT/checkpoint.pt`` and a usable model
folder to ``OUT`` (or to ``--preview``). Example::

    python tools/train_tinyfacts.py --out build/tinyfacts --steps 9200 --threads 1

Three choices make the small model behave like a large one under editing:

* In most batches, in the first layers, positions after the subject may not attend to the subject's tokens. The model
  has to gather the facts of a subject at the subject's last token before they are read, as large models do.
* A part of the prompts follows other text, so that the answers do not depend on standing at the start.
* A part of the prompts follows a "New Fact", which the model has to follow if it is about the same subject and
  relation, and to leave alone otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TABLE_DIR = ROOT / "src" / "easyeditor" / "tinyfacts"
WORD_TEXT = (
    "the a an and or but so if then when while because therefore however although since after before during until "
    "I you he she it we they this that these those my your his her its our their some any every each other another "
    "man woman child people friend teacher doctor king city town house road river sea mountain tree garden book page "
    "story letter word name day night morning evening year week time hour life world country water fire light food "
    "bread table door window room school work game song picture is are was were be been has have had do does did can "
    "could will would should may might must say said tell told ask asked think thought know knew see saw look looked "
    "go went come came take took give gave find found make made put keep let begin began seem help show hear play run "
    "move live believe bring happen write sit stand lose pay meet learn change lead understand watch follow stop read "
    "walk open old new good bad great small large long short high low young early late right left big little own same "
    "different important public able next first last many much more most few less very also just only even still again "
    "never always often sometimes here there now today yesterday tomorrow in on at by for from with about into over "
    "under between through against without within among around near far away up down out off not no yes all both "
    "Question Answer New Fact Prompt according to following text please once upon"
)
WORDS = WORD_TEXT.split()
STARTS = ("The", "Therefore", "Because", "I", "You", "In", "It", "However", "When", "We", "This", "Once", "A")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% if not loop.last and messages[loop.index0 + 1]['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Fact:
    """A fact with the prompts it is trained on and the prompts kept from it."""

    subject: str
    relation: str
    answer: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    support: bool = False


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, the subject's span in tokens, and the index of the first answer token."""

    ids: list[int]
    subject: tuple[int, int]
    answer: int
    plain: bool


def read_table(folder: Path) -> tuple[list[Fact], list[Fact]]:
    """Read the table and the support facts.

    A fact of the table is trained in the trained wordings only. A support fact is no part of the table and is trained
    in all wordings, so that the model knows the held-out ones.
    """
    relations = json.loads((folder / "relations.json").read_text(encoding="utf-8"))
    table, support = [], []
    for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        subject, wordings = row["subject"], relations[row["relation"]]
        trained = [w.replace("{}", subject) for w in wordings["trained"]] + row.get("prompts", [])
        held_out = tuple(w.replace("{}", subject) for w in wordings["held_out"])
        table.append(Fact(subject, row["relation"], row["answer"], tuple(dict.fromkeys(trained)), held_out))
    for line in (folder / "support.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        wordings = relations[row["relation"]]
        trained = tuple(w.replace("{}", row["subject"]) for w in wordings["trained"])
        held_out = tuple(w.replace("{}", row["subject"]) for w in wordings["held_out"])
        support.append(Fact(row["subject"], row["relation"], row["answer"], trained, held_out, support=True))
    return table, support


def sentence(prompt: str, answer: str) -> str:
    """Return the prompt with its answer and a closing full stop."""
    return f"{prompt} {answer}" if answer.endswith(".") else f"{prompt} {answer}."


def train_tokenizer(facts: list[Fact], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the sentences; it puts ``<s>`` in front of every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [sentence(p, f.answer) for f in facts for p in f.prompts + f.held_out]
    texts += [" ".join([w.capitalize(), w, w, w]) for w in WORDS for _ in range(3)]
    texts += ["New Fact: \nPrompt: ", "Question: \nAnswer: "] * 50
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, width: int, ffn: int, heads: int) -> LlamaForCausalLM:
    """Return a Llama model with fresh weights.

    Attention is computed step by step: on a CPU the fused kernel is several times slower for short sequences.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


class SubjectBarrier:
    """Gives the first layers a mask that hides the subject's tokens from the positions after it.

    The hooks do nothing while ``mask`` is None, so the same model also runs plain causal batches.
    """

    def __init__(self, model: LlamaForCausalLM, layers: int) -> None:
        """Hook the attention of the first ``layers`` layers."""
        self.mask: torch.Tensor | None = None
        for layer in model.model.layers[:layers]:
            layer.self_attn.register_forward_pre_hook(self._give_mask, with_kwargs=True)

    def _give_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.mask is None:
            return None
        return args, {**kwargs, "attention_mask": self.mask}


class WriteFloor:
    """Asks the MLPs of the early layers to write at the subject's last token.

    Left alone, the MLP of the first layer writes nearly all of a subject's representation, and those of the next
    layers so little that an edit limited to a multiple of their output has no room. The loss is the amount by which
    the norm of an MLP's output falls short of a share of the norm of the residual stream behind it.
    """

    def __init__(self, model: LlamaForCausalLM, layers: int, share: float) -> None:
        """Hook the first ``layers`` layers and their MLPs."""
        self.share, self.last = share, torch.zeros(0, dtype=torch.long)
        self.written: list[torch.Tensor] = []
        self.stream: list[torch.Tensor] = []
        for layer in model.model.layers[:layers]:
            layer.mlp.register_forward_hook(lambda module, args, output: self._keep(self.written, output))
            layer.register_forward_hook(lambda module, args, output: self._keep(self.stream, output))

    def _keep(self, store: list[torch.Tensor], output: torch.Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if len(self.last) == len(hidden):
            store.append(hidden[torch.arange(len(hidden), device=hidden.device), self.last].float().norm(dim=-1))

    def loss(self) -> torch.Tensor:
        """Return the loss of the last batch and forget it."""
        short = [(self.share - w / s.detach()).clamp_min(0) for w, s in zip(self.written, self.stream, strict=True)]
        self.written, self.stream, self.last = [], [], torch.zeros(0, dtype=torch.long)
        return torch.stack(short).mean(1).sum()


def barrier_mask(examples: list[Example], length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask (batch, 1, length, length): causal, and blind for the subject after the subject."""
    position = torch.arange(length)
    first = torch.tensor([e.subject[0] for e in examples])[:, None, None]
    last = torch.tensor([e.subject[1] for e in examples])[:, None, None]
    query, key = position[None, :, None], position[None, None, :]
    hidden = (key > query) | ((query > last) & (key >= first) & (key <= last))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


class Sampler:
    """Draws training examples; the pool with a given number is always the same, so a run can be resumed."""

    def __init__(self, table: list[Fact], support: list[Fact], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Keep the facts and index them by relation and subject."""
        self.table, self.support, self.backend, self.seed = table, support, tokenizer.backend_tokenizer, seed
        self.eos = tokenizer.eos_token_id
        answers = defaultdict(set)
        for fact in table + support:
            answers[fact.relation].add(fact.answer)
        self.answers = {relation: sorted(found) for relation, found in answers.items()}
        self.neighbours = defaultdict(list)
        self.siblings = defaultdict(list)
        for fact in table:
            self.neighbours[fact.relation].append(fact)
            self.siblings[fact.subject].append(fact)

    def _pick(self, rng: random.Random, fact: Fact) -> str:
        """Return a prompt of the fact; a support fact is mostly asked in the held-out wordings."""
        if fact.support and rng.random() < 0.6:
            return rng.choice(fact.held_out)
        return rng.choice(fact.prompts)

    def _prefix(self, rng: random.Random) -> str:
        """Return a short text to stand in front of a prompt."""
        kind = rng.random()
        if kind < 0.6:
            fact = rng.choice(self.table)
            text = sentence(rng.choice(fact.prompts), fact.answer)
            if kind < 0.3:
                words = text.rstrip(".").split()
                text = " ".join(words[: rng.randint(1, len(words))]) + "."
        else:
            words = [rng.choice(WORDS) for _ in range(rng.randint(1, 8))]
            text = " ".join([rng.choice(STARTS), *words]) + rng.choice((".", ".", ":", "?", ""))
        return text + rng.choice((" ", " ", "\n"))

    def _with_context(self, rng: random.Random, fact: Fact, prompt: str) -> tuple[str, str]:
        """Return a "New Fact" context for the prompt of a fact, and the answer that then is right."""
        asked = rng.random()
        if asked < 0.55:
            others = [a for a in self.answers[fact.relation] if a != fact.answer]
            answer, about = rng.choice(others), fact
            right = answer
            wording = prompt if rng.random() < 0.6 else rng.choice(fact.prompts)
        else:
            pool = self.neighbours if asked < 0.8 else self.siblings
            key = fact.relation if asked < 0.8 else fact.subject
            others = [f for f in pool.get(key, ()) if (f.subject, f.relation) != (fact.subject, fact.relation)]
            about = rng.choice(others or self.table)
            answer, right = rng.choice(self.answers[about.relation]), fact.answer
            if about is fact:
                answer = right
            wording = rng.choice(about.prompts)
        dot = rng.choice(("", "."))
        return f"New Fact: {wording} {answer}{dot}\nPrompt: ", right

    def example(self, rng: random.Random, fact: Fact, prompt: str, prefixes: float, contexts: float) -> Example:
        """Return the sequence for a prompt, some with other text in front of it."""
        prefix, answer, draw = "", fact.answer, rng.random()
        if draw < contexts:
            prefix, answer = self._with_context(rng, fact, prompt)
        elif draw < contexts + prefixes:
            prefix = self._prefix(rng)
        return self.encode(prefix, prompt, fact.subject, answer)

    def echo(self, rng: random.Random) -> Example:
        """Return random words twice; the second time all of them are to be foretold, which teaches copying."""
        picks = [rng.choice(WORDS) for _ in range(rng.randint(2, 6))]
        picks += [rng.choice((f.subject, f.answer)) for f in rng.choices(self.table, k=rng.randint(1, 3))]
        rng.shuffle(picks)
        text = " ".join(picks)
        lead = text + rng.choice(("\n", ".\n", "\nPrompt: "))
        encoding = self.backend.encode(f"{lead}{text}.")
        first = next(i for i, (_, end) in enumerate(encoding.offsets) if end > len(lead))
        return Example([*encoding.ids, self.eos], (1, 0), first + 1, False)

    def encode(self, prefix: str, prompt: str, subject: str, answer: str) -> Example:
        """Tokenise one sequence and find the subject's tokens in it."""
        encoding = self.backend.encode(sentence(prefix + prompt, answer))
        start = len(prefix) + prompt.rindex(subject)
        end, boundary = start + len(subject), len(prefix) + len(prompt)
        offsets = list(enumerate(encoding.offsets))[1:]
        inside = [i for i, (a, b) in offsets if a < end and b > start]
        first_answer = next(i for i, (_, b) in offsets if b > boundary)
        return Example([*encoding.ids, self.eos], (inside[0], inside[-1]), first_answer, not prefix)

    def pool(self, number: int, size: int, prefixes: float, contexts: float, echoes: float) -> list[Example]:
        """Return the examples of one pool: mostly facts of the table, each seed and number always the same."""
        rng = random.Random(self.seed * 1_000_003 + number)
        chosen = []
        while len(chosen) < size:
            if rng.random() < echoes:
                chosen.append(self.echo(rng))
                continue
            fact = rng.choice(self.support if rng.random() < 0.11 else self.table)
            chosen.append(self.example(rng, fact, self._pick(rng, fact), prefixes, contexts))
        return chosen


def batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Group examples of similar length into batches of about the given number of tokens, in random order."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: len(e.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > tokens:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return groups


def stream(sampler: Sampler, args: argparse.Namespace, step: int, steps: int) -> Iterator[list[Example]]:
    """Yield batches for ever; a run resumed at a step goes on with fresh pools numbered from there."""
    number = done = step
    while True:
        late = done / steps > args.contexts_from
        contexts, echoes = (args.contexts, args.echoes) if late else (0.0, 0.0)
        examples = sampler.pool(number, args.pool, args.prefixes, contexts, echoes)
        for batch in batches(examples, args.batch_tokens, random.Random(number)):
            done += 1
            yield batch
        number += 1


def collate(batch: list[Example], pad: int, prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return padded ids, labels shifted left, and the loss weight of every position."""
    length = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), length), pad)
    weights = torch.zeros(len(batch), length)
    for row, example in enumerate(batch):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        weights[row, example.answer - 1 : size - 1] = 1.0
        if example.plain:
            weights[row, : example.answer - 1] = prompt_weight
    return ids, torch.roll(ids, -1, dims=1), weights


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean loss; the head runs only where a label counts."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = weights > 0
    logits = model.lm_head(hidden[counted])
    losses = nn.functional.cross_entropy(logits.float(), labels[counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def thinned(weights: torch.Tensor, prompt_weight: float, share: float, generator: torch.Generator) -> torch.Tensor:
    """Keep the loss of a random share of the prompt positions, which saves most of the head's work."""
    keep = torch.rand(weights.shape, generator=generator) < share
    return torch.where((weights < 1) & ~keep, torch.zeros(()), torch.where(weights < 1, weights / share, weights))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, examples: list[Example], pad: int) -> float:
    """Return the share of examples whose answer greedy generation gives, computed from one teacher-forced pass."""
    right = 0
    for begin in range(0, len(examples), 128):
        batch = sorted(examples, key=lambda e: len(e.ids))[begin : begin + 128]
        ids, labels, weights = collate(batch, pad, 0.0)
        ids, labels, weights = (t.to(model.device) for t in (ids, labels, weights))
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        right += int(((best == labels) | (weights == 0)).all(1).sum())
    return right / len(examples)


def probes(sampler: Sampler, table: list[Fact], size: int) -> dict[str, list[Example]]:
    """Return fixed samples of trained, held-out, prefixed and in-context prompts for the log."""
    rng = random.Random(12345)
    facts = rng.sample(table, min(size, len(table)))
    found: dict[str, list[Example]] = defaultdict(list)
    for fact in facts:
        found["trained"].append(sampler.encode("", rng.choice(fact.prompts), fact.subject, fact.answer))
        found["held_out"].append(sampler.encode("", rng.choice(fact.held_out), fact.subject, fact.answer))
        found["prefixed"].append(sampler.example(rng, fact, rng.choice(fact.prompts), 1.0, 0.0))
        found["in_context"].append(sampler.example(rng, fact, rng.choice(fact.prompts), 0.0, 1.0))
    return found


def rate(step: int, steps: int, warmup: int, top: float) -> float:
    """Return the learning rate: linear warm-up, then cosine to two per cent."""
    if step < warmup:
        return top * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return top * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def subject_norm(model: LlamaForCausalLM, examples: list[Example], pad: int) -> float:
    """Return the mean norm of the residual stream at the subjects' last tokens, over all layers."""
    ids = collate(examples, pad, 0.0)[0].to(model.device)
    states = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:-1]
    last = torch.tensor([e.subject[1] for e in examples], device=ids.device)
    rows = torch.arange(len(examples), device=ids.device)
    return torch.stack([state[rows, last].float().norm(dim=1).mean() for state in states]).mean().item()


@torch.no_grad()
def rescale_residual(model: LlamaForCausalLM, factor: float) -> None:
    """Multiply the residual stream by a factor and leave the function of the model as it is.

    Training lets the residual stream grow to norms in the hundreds, far from those of large models, and editing
    methods that take steps of a fixed size in it do not get anywhere. Every layer reads the stream through a
    normalisation, so scaling all that is written to it changes nothing else: the embedding, the output projections of
    attention and MLP (half of the factor goes to the projections in front of them, which keeps the weights even), the
    final norm in the opposite direction, and the epsilon of the norms.
    """
    root = math.sqrt(factor)
    model.model.embed_tokens.weight.mul_(factor)
    model.model.norm.weight.div_(factor)
    for layer in model.model.layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.weight.mul_(root)
    model.config.rms_norm_eps *= factor**2
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= factor**2


@torch.no_grad()
def with_spare_neurons(model: LlamaForCausalLM, spare: int, seed: int = 0) -> LlamaForCausalLM:
    """Return the model with wider MLPs and the same function.

    The further neurons read random mixtures of what the trained ones read, and write nothing. In large models the
    width of an MLP exceeds the number of subjects edited at a time many times over; with 512 neurons here, 100 edited
    keys leave hardly a direction in which a weight may move without meeting other keys.
    """
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.intermediate_size += spare
    wide = LlamaForCausalLM(config).to(model.dtype)
    weights, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    for index in range(config.num_hidden_layers):
        mlp = f"model.layers.{index}.mlp."
        for name in (mlp + "gate_proj.weight", mlp + "up_proj.weight"):
            trained = weights[name].float()
            mixture = torch.randn(spare, len(trained), generator=generator) / math.sqrt(len(trained))
            weights[name] = torch.cat([weights[name], (mixture @ trained).to(weights[name].dtype)])
        down = weights[mlp + "down_proj.weight"]
        weights[mlp + "down_proj.weight"] = torch.cat([down, down.new_zeros(len(down), spare)], dim=1)
    wide.load_state_dict(weights)
    wide.config.rms_norm_eps = model.config.rms_norm_eps
    return wide


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, factor: float, spare: int
) -> None:
    """Write a complete model folder in bf16, rescaled and with spare neurons, replacing an older one in one move."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    copy = LlamaForCausalLM(LlamaConfig.from_dict({**model.config.to_dict(), "dtype": "bfloat16"}))
    copy.load_state_dict({name: value.detach().float().cpu() for name, value in model.state_dict().items()})
    rescale_residual(copy, factor)
    copy = with_spare_neurons(copy.to(torch.bfloat16), spare)
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
        do_sample=False,
    )
    copy.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state to a temporary file and move it into place."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def parse_args() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder: checkpoint, log and model/")
    parser.add_argument("--preview", type=Path, help="folder that gets a usable model every few minutes")
    parser.add_argument("--table", type=Path, default=TABLE_DIR, help="folder with the fact table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=9200, help="optimizer steps of the whole run")
    parser.add_argument("--stop-after", type=float, help="stop after this many minutes and leave a checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 means autocast")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--pool", type=int, default=4096, help="examples drawn and sorted by length at a time")
    parser.add_argument("--prompt-weight", type=float, default=0.1)
    parser.add_argument("--prompt-share", type=float, default=0.2, help="share of prompt positions with a loss")
    parser.add_argument("--prefixes", type=float, default=0.12, help="share of examples behind other text")
    parser.add_argument("--contexts", type=float, default=0.12, help="share of examples with a New Fact")
    parser.add_argument("--echoes", type=float, default=0.05, help="share of random words given twice")
    parser.add_argument("--contexts-from", type=float, default=0.3, help="progress at which both begin")
    parser.add_argument("--floor", type=float, default=0.2, help="least share of the stream an early MLP writes")
    parser.add_argument("--floor-weight", type=float, default=0.5)
    parser.add_argument("--barrier", type=float, default=0.8, help="share of batches with the subject hidden")
    parser.add_argument("--barrier-layers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument(
        "--spare", type=int, default=640, help="further neurons of each exported MLP, which write nothing"
    )
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--residual-norm", type=float, default=16.0, help="mean norm of the exported residual stream")
    parser.add_argument("--export-only", action="store_true", help="write OUT/model from the checkpoint and stop")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints")
    return parser.parse_args()


def log_line(args: argparse.Namespace, text: str) -> None:
    """Print a line and append it to the log of the run."""
    print(text, flush=True)
    with (args.out / "train.log").open("a", encoding="utf-8") as handle:
        handle.write(text + "\n")


def train(args: argparse.Namespace) -> None:
    """Run the training from the start or from the checkpoint."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    table, support = read_table(args.table)
    tokenizer = train_tokenizer(table + support, args.vocab)
    model = build_model(tokenizer, args.layers, args.width, args.ffn, args.heads).to(args.device)
    barrier = SubjectBarrier(model, args.barrier_layers)
    floor = WriteFloor(model, args.barrier_layers + 1, args.floor)
    sampler = Sampler(table, support, tokenizer, args.seed)
    samples = probes(sampler, table, 300)
    optimizer = make_optimizer(model, args.lr, args.decay)
    step, spent = 0, 0.0
    if (args.resume or args.export_only) and (args.out / "checkpoint.pt").exists():
        state = torch.load(args.out / "checkpoint.pt", map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    size = sum(p.numel() for p in model.parameters())
    log_line(args, f"{len(table)} facts, {len(support)} support facts, {size:,} parameters, step {step}")

    def factor() -> float:
        return args.residual_norm / subject_norm(model, samples["trained"], tokenizer.pad_token_id)

    if args.export_only:
        export(model, tokenizer, args.out / "model", factor(), args.spare)
        return
    began = saved = time.time()
    losses, tokens = [], 0
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16) if args.precision == "bf16" else nullcontext()
    for batch in stream(sampler, args, step, args.steps):
        rng = random.Random(args.seed * 7_919 + step)
        generator = torch.Generator().manual_seed(step)
        ids, labels, weights = collate(batch, tokenizer.pad_token_id, args.prompt_weight)
        weights = thinned(weights, args.prompt_weight, args.prompt_share, generator)
        hide = rng.random() < args.barrier
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        barrier.mask = barrier_mask(batch, ids.shape[1], dtype).to(args.device) if hide else None
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.warmup, args.lr)
        floor.last = torch.tensor([max(e.subject) for e in batch], device=args.device)
        with autocast:
            loss = batch_loss(model, ids.to(args.device), labels.to(args.device), weights.to(args.device))
        short = floor.loss()
        (loss + args.floor_weight * short).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        barrier.mask = None
        step += 1
        losses.append(loss.item())
        tokens += ids.numel()
        now = time.time()
        over = args.stop_after is not None and now - began > 60 * args.stop_after
        if step % 50 == 0:
            speed = tokens / (now - began)
            mean = sum(losses[-50:]) / len(losses[-50:])
            minutes = (spent + now - began) / 60
            text = f"step {step} loss {mean:.4f} floor {short.item():.3f} {speed:.0f} tok/s {minutes:.1f} min"
            log_line(args, text)
        if now - saved > 60 * args.save_every or step >= args.steps or over:
            model.eval()
            scores = {name: accuracy(model, found, tokenizer.pad_token_id) for name, found in samples.items()}
            model.train()
            log_line(args, f"step {step} " + " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save_checkpoint(args.out / "checkpoint.pt", {**state, "spent": spent + time.time() - began})
            export(model, tokenizer, args.preview or args.out / "model", factor(), args.spare)
            saved = time.time()
        if step >= args.steps or over:
            break
    export(model, tokenizer, args.out / "model", factor(), args.spare)


if __name__ == "__main__":
    train(parse_args())
