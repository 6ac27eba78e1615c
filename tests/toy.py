"""A toy world of facts, and small models of several families that are taught it in seconds.

As for the bundled model, in most batches positions after the subject may not look at the subject's tokens in the first
layers: the model has to gather a subject's facts at its last token, as large models do, or no fact could be edited.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from easyeditor.edits.ledger import Ledger
from easyeditor.lm.model import LM
from easyeditor.lm.text import Encoded
from easyeditor.requests import EditRequest, Probe

FIRST, LAST = ("ada", "bo", "cy"), ("ra", "su", "to", "vi")
SUBJECTS = tuple(f"{a} {b}" for a in FIRST for b in LAST)
ANSWERS = {
    "home": ("oslo", "rome", "lima", "cairo", "paris"),
    "job": ("baker", "pilot", "nurse", "judge", "clown"),
}
WORDINGS = {
    "home": ("the home of {} is", "{} lives in", "where does {} live ?"),
    "job": ("the job of {} is", "{} works as", "what does {} do ?"),
}
EXTRA = ("new", "fact", ":", "prompt", ".", "a", "is", "and", "then", "New", "Fact", "Prompt", "I", "You", "The")
BARRIER_LAYERS, LAYERS, WIDTH = 2, 4, 64
KEPT = Path(__file__).parent / "toys"  # the weights of taught models, in half precision


def truth() -> dict[tuple[str, str], str]:
    """The answer to each relation of each subject."""
    rng = random.Random(7)
    return {(relation, s): rng.choice(answers) for relation, answers in ANSWERS.items() for s in SUBJECTS}


TRUTH = truth()


def prompts() -> list[tuple[str, str, str]]:
    """All prompts with subject and answer."""
    return [(wording.format(s), s, answer) for (relation, s), answer in TRUTH.items() for wording in WORDINGS[relation]]


def corpus() -> list[str]:
    """Text of the toy world, with more tokens than a projection has inputs."""
    rng, facts = random.Random(3), prompts()
    return [" . ".join(f"{p} {a}" for p, _, a in rng.sample(facts, 3)) for _ in range(400)]


def tokenizer(bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """One token per word."""
    text = " ".join([*(p for p, _, _ in prompts()), *(a for found in ANSWERS.values() for a in found), *EXTRA])
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(text.replace("\n", " ").split()))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
GATED = {**SHAPE, "num_key_value_heads": 2}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.08}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SEEDS = {"gpt2": 5, "llama": 3, "falcon": 2}  # of the facts' order, where a model of seed 0 takes edits badly
# What the fast lane runs; the full product of methods and families is slow.
ON_ALL = ("FT", "ROME", "MEMIT", "GRACE", "ICE")
ON_TWO = ("AlphaEdit", "LoRA", "CrispEdit", "UltraEdit", "KN", "IKE", "SCR", "WISE", "MEND", "SERAC", "MALMEN")
IN_HALF = [(name, "gpt2") for name in (*ON_ALL, "LoRA", "MEND")]  # with fp16 too; all others with fp32 and bf16


def fast(name: str) -> tuple[str, ...]:
    """The families on which the fast lane tries a method."""
    families = ("gpt2", "llama", "gemma2", "falcon", "t5")
    return families[: 5 if name in ON_ALL else 2 if name in ON_TWO else 1]


FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **DROPOUT}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GATED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GATED),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "initializer_range": 0.08},
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SHAPE),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "initializer_range": 0.08},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "ffn_dim": 4 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "word_embed_proj_dim": WIDTH,
            "init_std": 0.08,
            "dropout": 0.0,
            "max_position_embeddings": 128,
        },
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", SHAPE),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": WIDTH,
            "d_ff": 4 * WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 16,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}


WRITE = {"v_num_grad_steps": 30, "v_lr": 0.5, "v_weight_decay": 0.0, "clamp_norm_factor": 8.0, "kl_factor": 0.0625,
         "context_template_length_params": [[2, 3]], "mom2_adjustment": True}  # fmt: skip
SPREAD = {**WRITE, "layers": [0, 1], "mom2_update_weight": 1.0}
SETTINGS: dict[str, dict[str, object]] = {  # of each method, for models as small as these
    "ROME": {**WRITE, "layers": [1]},
    "R-ROME": {**WRITE, "layers": [1]},
    "MEMIT": SPREAD,
    "MEMIT-FE": SPREAD,
    "EMMET": {**SPREAD, "layers": [1], "emmet_lambda": 0.1},
    "PMET": {**SPREAD, "layers": [0]},
    "AlphaEdit": {**SPREAD, "nullspace_threshold": 1.0, "L2": 0.1},
    "SPHERE": {**SPREAD, "nullspace_threshold": 1.0, "L2": 0.1, "suppression_strength": 0.2},
    "CORE": {**SPREAD, "context": "subject", "ctx_num": 2, "ctx_len": 3, "reg_lambda": 0.01, "layer_range": 1},
    "EAMET": {**SPREAD, "weight_decay_method": "norm", "delta_init": "zero"},
    "NAMET": {**SPREAD, "clamp_norm_factor": 4.0},
    "SimIE": {"lamHyper": 0.1, "base_method": "ROME", "base_settings": {**WRITE, "layers": [1]}},
    "FT": {"layers": [1], "lr": 1e-3, "num_steps": 80},
    "LocFT-BF": {"layers": [1], "lr": 1e-3, "num_steps": 80},
    "FT_uns": {"layers": [1], "lr": 1e-3, "num_steps": 80},
    "LoRA": {"lr": 1e-3},
    "LoRA_uns": {"lr": 1e-3},
    "QLoRA": {"lr": 1e-3},
    "DPO": {"lr": 1e-3, "num_steps": 40, "with_end": True},
    "IKE": {"retriever": "bm25", "k": 2},
    "SCR": {"retriever": "bm25", "confirm": "none"},
    "GRACE": {"n_iter": 60, "eps": 0.1},
    "DEFER": {"edit_lr": 1e-2, "n_iter": 80, "margin": 0.05},
    "MELO": {},
    "WISE": {
        "edit_lr": 0.1,
        "mask_ratio": 0.5,
        "n_iter": 80,
        "alpha": 1.5,
        "beta": 4.0,
        "gamma": 2.0,
        "act_ratio": 0.8,
        "save_freq": 2,
        "context_template_length_params": [],
    },
    "MEMOIR": {"edit_lr": 0.5, "n_iter": 60, "top_k": 64, "irr_threshold": 0.7, "context_template_length_params": []},
    "T-Patcher": {"max_edit_step": 60},
    "UnKE": {"layers": [1], "lr": 1e-3, "v_lr": 0.2},
    "AnyEdit": {"layers": [1], "lr": 1e-3, "v_lr": 0.2, "window_size": 1},
    "DINM": {"lr": 1e-3, "num_steps": 60, "kl_factor": 1.0},
    "CrispEdit": {"layers": [0, 1, 2], "lr": 2e-3, "num_steps": 80, "energy_threshold": 0.9, "mom2_tokens": 3000},
    "KN": {"steps": 10, "adaptive_threshold": 0.5, "lr_scale": 1.0},
    "UltraEdit": {"inner_params": [], "lr": 2e-2, "warm_up": 300, "batch_size_once": 100},
    "StableEdit": {"inner_params": [], "lr": 4e-2, "warm_up": 600, "batch_size_once": 100, "alpha": 1.0},
    "KE": {"lr_scale": 1.25},
}


SHORT = {"rank": 16, "rephrases": 0, "probes": 4, "accumulate_bs": 8, "batch_size_once": 8, "val_batch_size": 1,
         "final_eval": False}  # fmt: skip
SHIFTS = {**SHORT, "lr": 1e-2, "meta_lr": 1e-3, "lr_lr": 1e-4, "n_edits": 1, "max_iters": 200, "val_interval": 100}
TRAINED: dict[str, dict[str, object]] = {  # how the methods that are trained learn the toy world
    "MEND": {**SHORT, "edit_lr": 6e-3, "lr": 2e-3, "lr_lr": 1e-4, "cedit": 1.0, "max_iters": 800, "val_interval": 200,
             "grad_clip": 1.0},
    "MALMEN": SHIFTS,
    "RLEdit": {**SHIFTS, "n_blocks": 2, "num_seq": 4, "max_iters": 50, "accumulate_bs": 2, "val_batch_size": 4,
               "val_interval": 25, "loc_coef": 1.0, "reg_coef": 0.0},
    "SERAC": {"width": 32, "lr": 3e-3, "cedit": 1.0, "supervised": True, "use_all_negatives": True, "rephrases": 2,
              "probes": 4, "batch_size": 8, "accumulate_bs": 1, "max_iters": 100, "val_interval": 100,
              "val_batch_size": 1, "grad_clip": 1.0, "final_eval": False},
}  # fmt: skip

TRAINED |= {
    "InstructEdit": TRAINED["MEND"],
    "KE": {**{name: SHORT[name] for name in SHORT if name != "rank"},
           "edit_lr": 0.1, "lr": 3e-3, "lr_alpha": 0.05, "margin": 1e-3, "cedit": 1.0, "lstm_dim": 16,
           "condition_dim": 32, "hidden_dim": 16, "batch_size": 2, "accumulate_bs": 6, "max_iters": 1000,
           "val_interval": 200, "grad_clip": 1.0},
}  # fmt: skip


def archive(lm: LM, method: str = "MEND", brief: bool = False) -> str:
    """What a method has learnt on a model, from the facts of the toy world; trained once for all test processes.

    A brief training learns nothing: it is for a model that knows nothing.
    """
    from easyeditor.registry import get_method  # not for all that use a toy
    from easyeditor.trainer import EditTrainer

    base = Ledger.of(lm).base(lm.mlp_out(0).weight_name)  # as it was before any edit
    mark = f"{lm.name}-{float(base.detach().float().abs().mean()):.2e}"  # the same in every precision
    folder = Path(os.environ["EASYEDITOR_TAUGHT"]) / f"{method.lower()}-{mark}"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "results.json").exists():
            facts = [request(i, relation) for i in range(len(SUBJECTS)) for relation in ANSWERS]
            # of an MLP with a norm of its own or with ReLU keys, edits add up badly in models this small
            place = lm.attn_out if lm.name in ("toy-gemma2", "toy-opt") else lm.mlp_out
            names = [place(i).weight_name for i in range(len(lm.blocks))][-2:]
            own = LM.wrap(copy.deepcopy(lm.model).float(), lm.tokenizer, name=lm.name)
            training = get_method(method).hparams.training
            length = {"max_iters": 2, "val_interval": 2} if brief else {}
            config = training(model_name="toy", inner_params=names, **{**TRAINED[method], **length})
            EditTrainer(config, facts, facts, out=folder, lm=own).run()
            (folder / "results.json").touch()
    return str(folder)


def build(family: str, seed: int = 0) -> LM:
    """A model of a family with random weights, and the toy tokenizer."""
    tok = tokenizer(bos=family not in ("gpt2", "neox", "t5"))
    cls, config, shape = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(getattr(transformers, config)(vocab_size=len(tok), **special, **shape))
    return LM.wrap(model, tok, name=f"toy-{family}")


@cache
def _taught(family: str) -> LM:
    """From the file that this script wrote: another processor would teach other weights."""
    lm, found = build(family), load_file(KEPT / f"{family}.safetensors")
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            weight.copy_(found[name])
    lm.model.eval()
    return lm


def newly_taught(family: str, seed: int = 0) -> LM:
    """A model that has just learnt the toy world."""
    lm = build(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        teach(lm, steps=480, seed=seed)
    return lm


def taught(family: str, dtype: torch.dtype = torch.float32) -> LM:
    """A fresh copy of a model that knows the toy world."""
    lm = _taught(family)
    model = copy.deepcopy(lm.model).to(dtype)
    return LM.wrap(model, lm.tokenizer, name=lm.name)


def teach(lm: LM, steps: int, seed: int = 0) -> None:
    """Train a model on the toy world: prompts, some of them behind a new fact that is to be followed."""
    model, rng = lm.model.train(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    facts = prompts()
    for step in range(steps):
        batch = [in_context(rng) for _ in range(24)] if step % 4 == 3 else [behind_words(rng, f) for f in facts]
        ids, mask, labels, barrier, source = encode(lm, batch)
        with barred(lm, barrier if step % 5 else None):
            if lm.seq2seq:
                out = model(input_ids=source, attention_mask=(source != 0).long(), labels=labels)
                loss = out.loss
            else:
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def behind_words(rng: random.Random, fact: tuple[str, str, str]) -> tuple[str, str, str]:
    """The same fact, every other time behind a few words that have nothing to do with it."""
    prompt, subject, answer = fact
    words = rng.choices([*FIRST, *LAST, *EXTRA], k=rng.randint(1, 4))
    return (f"{' '.join(words)} . {prompt}" if rng.random() < 0.5 else prompt), subject, answer


def in_context(rng: random.Random) -> tuple[str, str, str]:
    """A prompt behind a new fact about it, with the new answer."""
    relation, subject = rng.choice(list(TRUTH))
    answer = rng.choice(ANSWERS[relation])
    told, asked = (rng.choice(WORDINGS[relation]).format(subject) for _ in range(2))
    return f"New Fact: {told} {answer}\nPrompt: {asked}", subject, answer


def encode(lm: LM, batch: list[tuple[str, str, str]]) -> tuple[torch.Tensor, ...]:
    """Right-padded rows, labels on answer and end, and which positions may look where."""
    rows, starts, spans = [], [], []
    texts = [f"{prompt} {answer}" for prompt, _, answer in batch]
    found = lm.tokenizer(texts, return_offsets_mapping=True)  # all at once, and so many times faster than one by one
    encodings = map(Encoded, texts, map(tuple, found["input_ids"]), found["offset_mapping"])
    for (prompt, subject, _), encoded in zip(batch, encodings, strict=True):
        first = lm.text.first_after(encoded, len(prompt))
        start = prompt.rindex(subject)
        last = lm.text.last_in(encoded, start, start + len(subject))
        rows.append([*encoded.ids, 2])
        starts.append(first)
        spans.append((last - 1, last))
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = (torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]).long()
    labels = torch.where((torch.arange(length) >= torch.tensor(starts)[:, None]) & (mask == 1), ids, -100)
    if lm.seq2seq:
        source = [row[:start] for row, start in zip(rows, starts, strict=True)]
        answers = [row[start:] for row, start in zip(rows, starts, strict=True)]
        longest = max(map(len, source))
        source_ids = torch.tensor([row + [0] * (longest - len(row)) for row in source])
        return ids, mask, torch.tensor(answers), torch.empty(0), source_ids
    query, key = torch.arange(length)[None, :, None], torch.arange(length)[None, None, :]
    first, last = (torch.tensor([span[i] for span in spans])[:, None, None] for i in (0, 1))
    hidden = (key > query) | ((query > last) & (key >= first) & (key <= last))
    additive = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None]
    return ids, mask, labels, additive, torch.empty(0)


@contextmanager
def barred(lm: LM, additive: torch.Tensor | None) -> Iterator[None]:
    """Give the first layers' attention another mask."""
    if additive is None or lm.seq2seq:
        yield
        return

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return (args, {**kwargs, "attention_mask": additive}) if "attention_mask" in kwargs else None

    parents = [lm.attn_out(i).name.rpartition(".")[0] for i in range(BARRIER_LAYERS)]
    handles = [lm.model.get_submodule(p).register_forward_pre_hook(give, with_kwargs=True) for p in parents]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def request(index: int = 0, relation: str = "home") -> EditRequest:
    """An edit of the toy world, with paraphrases, neighbours and facts of the same subject."""
    subject = SUBJECTS[index]
    old = TRUTH[relation, subject]
    new = next(a for a in ANSWERS[relation] if a != old)
    near = [s for s in SUBJECTS if s.split()[0] != subject.split()[0] and s.split()[1] != subject.split()[1]][:4]
    wordings, other = WORDINGS[relation], next(name for name in WORDINGS if name != relation)
    return EditRequest(
        prompt=wordings[0].format(subject),
        subject=subject,
        target_new=new,
        ground_truth=old,
        target_neg=old,
        rephrase_prompts=tuple(w.format(subject) for w in wordings[1:]),
        loc_prompt=f"{WORDINGS[other][0].format(near[-1])} {TRUTH[other, near[-1]]}",
        locality={"neighborhood": tuple(Probe(wordings[0].format(s), (TRUTH[relation, s],)) for s in near)},
    )


def other_facts(edited: EditRequest) -> list[tuple[str, str]]:
    """Prompts and answers of all other subjects."""
    return [(p, a) for p, s, a in prompts() if s != edited.subject]


def keep(family: str, seed: int = 0) -> None:
    """Teach a model and write its weights where `taught` finds them: ``python tests/toy.py gpt2``."""
    KEPT.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().half() for name, weight in newly_taught(family, seed).model.named_parameters()}
    save_file(weights, KEPT / f"{family}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or FAMILIES:
        keep(each, SEEDS.get(each, 0))
