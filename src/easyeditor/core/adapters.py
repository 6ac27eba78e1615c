"""Low-rank adapters beside projections: found by structure, built by peft, trained, taken out again.

LoRA (Hu et al., 2021, arXiv:2106.09685): W x + (alpha / r) B A x. AdaLoRA (Zhang et al., 2023, arXiv:2303.10512):
W x + (alpha / r) P L Q x with a diagonal L, a penalty that keeps P and Q orthogonal, and a budget of ranks that falls
while it is trained.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyeditor.core.learn import SOLVED, Minibatch, refuse_quantised, train
from easyeditor.core.reading import refuse_ruin
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.errors import MissingExtra, UsageError
from easyeditor.hparams.adapters import AdapterSettings
from easyeditor.lm.hooks import fused_activations
from easyeditor.lm.model import LM
from easyeditor.lm.structure import ATTENTION_WORDS, Site

NAME = "edit"  # of the adapter inside peft
HEADROOM, WARM_UP, SETTLE, ORTHOGONAL = 1.5, 0.1, 0.3, 0.5  # of AdaLoRA: first rank, schedule, weight of the penalty


@dataclass(frozen=True)
class AdapterTraining:
    """What adapters are like and how they are trained.

    Args:
        kind: ``lora`` or ``adalora``.
        rank: Of an adapter; for AdaLoRA the mean over all adapters in the end.
        alpha: An adapter is scaled by alpha / rank.
        dropout: On what an adapter takes.
        epochs: How often each request is seen, at most.
        lr: Adam's step size.
        weight_decay: Adam's L2 factor, on the adapters.
        seed: Of the first values and of the dropout.
        stop_below: The mean loss of an epoch at which the training ends; None: never.
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    epochs: int
    lr: float
    weight_decay: float = 0.0
    seed: int = 0
    stop_below: float | None = SOLVED

    @classmethod
    def of(cls, hparams: Any, rank: int, stop_below: float | None = SOLVED) -> AdapterTraining:
        """Those of a method's settings, whatever name its rank has there."""
        return cls(
            hparams.lora_type,
            rank,
            hparams.lora_alpha,
            hparams.lora_dropout,
            hparams.num_steps,
            hparams.lr,
            hparams.weight_decay,
            hparams.seed,
            stop_below,
        )


def learned(
    lm: LM,
    sites: Sequence[Site],
    batches: Sequence[Minibatch],
    training: AdapterTraining,
    objective: Callable[[Minibatch], Tensor] = Minibatch.loss,
) -> tuple[dict[str, LowRank], list[float]]:
    """Train adapters beside some projections.

    Args:
        lm: The model; it is left as it is, and its weights are never changed.
        sites: The projections.
        batches: What to learn, made before.
        training: How.
        objective: The loss of a batch, a scalar.

    Returns:
        Module path -> what the adapter adds to its weight; the mean loss of each epoch.

    Raises:
        MissingExtra: peft is not installed.
        UsageError: The rank is above the width of a projection.
        NonFinite: The loss is not a finite number.
    """
    require_peft()
    for site in sites:
        if training.rank > (width := min(site.d_in, site.d_out)):
            raise UsageError(
                f"The rank of the adapters is {training.rank}, above the width {width} of '{site.name}'. "
                f"Choose a rank of at most {width}."
            )
    steps = training.epochs * len(batches)
    with lm.frozen(), fused_activations(lm.model), adapted(lm, sites, training, steps) as adapters:
        losses = train(
            adapters.parameters,
            [lambda batch=batch: objective(batch) for batch in batches],  # type: ignore[misc]
            epochs=training.epochs,
            lr=training.lr,
            stop_below=training.stop_below,
            penalty=adapters.penalty if training.weight_decay or training.kind == "adalora" else None,
            project=adapters.allocate,
        )
        return adapters.changes(), losses


def low_rank_edit(
    lm: LM,
    sites: Sequence[Site],
    batches: Sequence[Minibatch],
    hparams: AdapterSettings,
    objective: Callable[[Minibatch], Tensor] = Minibatch.loss,
    stop_below: float | None = SOLVED,
) -> WeightEdit:
    """Trained adapters as a change of weights.

    Args:
        lm: The model; it is left as it is.
        sites: The projections that get one.
        batches: What to learn.
        hparams: What they are like and how they are trained.
        objective: See `learned`.
        stop_below: See `AdapterTraining`.

    Raises:
        UsageError: The base is quantised.
        EditFailed: The trained model would read ordinary text worse than by guessing.
    """
    refuse_quantised(lm, sites)
    training = AdapterTraining.of(hparams, hparams.rank, stop_below)
    changes, losses = learned(lm, sites, batches, training, objective)
    deltas = {f"{name}.weight": change for name, change in changes.items() if change.rank}
    edit = WeightEdit(deltas=deltas, notes={"losses": losses, "adapter": adapter_note(lm, sites)})
    refuse_ruin(lm, edit, hparams.lr)
    return edit


def adapter_note(lm: LM, sites: Sequence[Site]) -> dict[str, Any]:
    """What peft has to know of the model to load the adapters."""
    task = "SEQ_2_SEQ_LM" if lm.seq2seq else "CAUSAL_LM"
    return {"task_type": task, "fan_in_fan_out": any(site.transposed for site in sites)}


class Adapters:
    """Adapters that are in a model.

    Args:
        layers: Module path -> peft's layer.
        tuner: peft's model of them, which shares the ranks out for AdaLoRA.
        training: How they are trained.
    """

    def __init__(self, layers: Mapping[str, Any], tuner: Any, training: AdapterTraining) -> None:
        self.layers, self.tuner, self.training = layers, tuner, training
        self.adaptive, self.updates = training.kind == "adalora", 0
        generator = torch.Generator().manual_seed(training.seed)
        for layer in layers.values():
            self._draw(layer, generator)
            layer.lora_dropout[NAME] = _Dropout(training.dropout, training.seed)
        self.parameters = [tensor for layer in layers.values() for tensor in self._of(layer)]

    def _of(self, layer: Any) -> list[nn.Parameter]:
        """A (r, d_in) and B (d_out, r), and for AdaLoRA the diagonal (r, 1)."""
        if self.adaptive:
            return [layer.lora_A[NAME], layer.lora_B[NAME], layer.lora_E[NAME]]
        return [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]

    def _draw(self, layer: Any, generator: torch.Generator) -> None:
        """The first values of the papers: the change is zero. In fp32, whatever the model's precision."""
        tensors = self._of(layer)
        for i, tensor in enumerate(tensors):
            start = torch.zeros(tensor.shape)
            if self.adaptive and i < 2:
                start.normal_(0.0, 0.02, generator=generator)
            elif i == 0:
                start.uniform_(-1, 1, generator=generator).div_(math.sqrt(tensor.shape[1]))
            tensor.data = start.to(tensor.device)

    def penalty(self) -> Tensor:
        """The L2 penalty, and for AdaLoRA |P^T P - I| + |Q Q^T - I|, the mean over all of them."""
        first = self.parameters[0]
        total = torch.zeros((), device=first.device)
        if self.training.weight_decay:
            total = total + self.training.weight_decay / 2 * torch.stack(
                [parameter.square().sum().to(first.device) for parameter in self.parameters]
            ).sum()  # fmt: skip
        if self.adaptive:
            grams = [
                gram - torch.eye(len(gram), device=gram.device)
                for a, b, _ in map(self._of, self.layers.values())
                for gram in (a @ a.T, b.T @ b)
            ]
            total = total + ORTHOGONAL * torch.stack([gram.norm().to(first.device) for gram in grams]).mean()
        return total

    def allocate(self) -> None:
        """After an update: AdaLoRA takes the least important ranks away, by its schedule."""
        self.updates += 1
        if self.adaptive:
            self.tuner.update_and_allocate(self.updates)

    @torch.no_grad()
    def changes(self) -> dict[str, LowRank]:
        """Module path -> what an adapter adds to its weight, as (d_out, d_in), fp32."""
        found = {}
        for name, layer in self.layers.items():
            scale = float(layer.scaling[NAME])
            a, b, *diagonal = (tensor.detach() for tensor in self._of(layer))
            if diagonal:
                kept = diagonal[0][:, 0] != 0
                scale /= float(layer.ranknum[NAME]) + 1e-5
                a, b = (a * diagonal[0])[kept], b[:, kept]
            found[name] = LowRank(b * scale, a.T.contiguous())
        return found


@contextmanager
def adapted(lm: LM, sites: Sequence[Site], training: AdapterTraining, steps: int) -> Iterator[Adapters]:
    """A context in which adapters stand beside some projections; after it the model's own modules are back."""
    peft: Any = import_module("peft")
    model, modules = lm.model, {site.name: site.module for site in sites}
    shape: dict[str, Any] = {
        "lora_alpha": training.alpha,
        "target_modules": list(modules),
        "fan_in_fan_out": all(isinstance(module, Conv1D) for module in modules.values()),
    }
    had = vars(model).get("peft_config")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws values of its own
            warnings.simplefilter("ignore")
            if training.kind == "adalora":
                first = max(round(HEADROOM * training.rank), training.rank)
                budget = {"init_r": first, "target_r": training.rank, "total_step": steps}
                schedule = {"tinit": round(WARM_UP * steps), "tfinal": round(SETTLE * steps)}
                config: Any = peft.AdaLoraConfig(**budget, **schedule, **shape)
                tuner: Any = peft.AdaLoraModel(model, config, NAME)
            else:
                tuner = peft.LoraModel(model, peft.LoraConfig(r=training.rank, **shape), NAME)
        yield Adapters({name: model.get_submodule(name) for name in modules}, tuner, training)
    finally:
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
        vars(model).pop("peft_config", None)
        if had is not None:
            model.peft_config = had


class _Dropout(nn.Module):
    """Dropout that draws from a generator of its own."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share, self.seed = share, seed
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.share:
            return x
        if self.generator is None:
            self.generator = torch.Generator(device=x.device).manual_seed(self.seed)
        kept = torch.empty_like(x).bernoulli_(1 - self.share, generator=self.generator)
        return x * kept / (1 - self.share)


class Beside:
    """What an adapter adds to what a projection returns, for a base whose weights cannot be added to.

    Args:
        left: (d_out, r).
        right: (d_in, r).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"left": self.left, "right": self.right}

    def config(self) -> dict[str, Any]:
        """Nothing else."""
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Beside:
        """The adapter whose factors these are."""
        return cls(tensors["left"], tensors["right"])

    @classmethod
    def combined(cls, wrappers: list[Beside]) -> Callable[[Tensor, Tensor], Tensor]:
        """One function for all adapters of a projection."""
        left = torch.cat([wrapper.left for wrapper in wrappers], dim=1)
        right = torch.cat([wrapper.right for wrapper in wrappers], dim=1)

        def add(taken: Tensor, given: Tensor) -> Tensor:
            added = taken.float() @ right.to(taken.device) @ left.T.to(taken.device)
            return (given.float() + added).to(given.dtype)

        return add


def targets(lm: LM, wanted: Sequence[str], layers: Sequence[int] = ()) -> list[Site]:
    """The projections that get an adapter.

    Args:
        lm: The model.
        wanted: Names as in peft, such as ``q_proj``, or patterns with ``*``; empty: the projections of queries and
            values, or the one projection of both.
        layers: The blocks to look in; empty: all, and with names also outside them.

    Raises:
        UsageError: There is none.
    """
    stacks = [f"{lm.stack}.{i}." for i in (layers or range(len(lm.blocks)))]
    if away := [i for i in layers if not 0 <= i < len(lm.blocks)]:
        raise UsageError(
            f"Setting 'layers': {lm.name} has blocks 0 to {len(lm.blocks) - 1}, not {away[0]}. Choose one of these."
        )
    everywhere = [name for name, module in lm.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = [name for name in everywhere if any(name.startswith(stack) for stack in stacks)]
    if not wanted:
        found = [name for stack in stacks for name in _queries_and_values(lm, stack)]
    else:
        found = [n for n in (inside if layers else everywhere) if any(_is_meant(n, pattern) for pattern in wanted)]
    if not found:
        first = ", ".join(name.removeprefix(stacks[0]) for name in inside if name.startswith(stacks[0]))
        raise UsageError(
            f"Setting 'target_modules': {lm.name} has no module {' or '.join(wanted) or 'of queries and values'}. "
            f"Block '{stacks[0][:-1]}' has: {first}. Name some of these."
        )
    return [lm.site(name) for name in found]


def _is_meant(name: str, pattern: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return "*" in pattern and re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name) is not None


def _queries_and_values(lm: LM, stack: str) -> list[str]:
    """Of each attention of a block: the projections of queries and values, or else all but the one that writes."""
    block = lm.model.get_submodule(stack[:-1])
    groups: dict[str, list[tuple[str, int]]] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and any(word in path.casefold() for word in ATTENTION_WORDS):
            parent, _, last = path.rpartition(".")
            groups.setdefault(parent, []).append((last, Site(path, module).d_out))
    found = []
    for parent, inside in groups.items():
        named = [[last for last, _ in inside if _letter(last) == letter] for letter in "qkv"]
        if all(len(names) == 1 for names in named):
            kept = [named[0][0], named[2][0]]
        else:
            wide = [last for last, out in inside if out > lm.width]
            kept = wide or [last for last, _ in inside[:-1]]
        found += [f"{stack}{parent}.{last}" for last in kept]
    return found


def _letter(name: str) -> str:
    """q, k or v for the projection of queries, keys or values; else nothing."""
    words = {"q": ("q", "query", "q_proj", "q_lin", "wq"), "k": ("k", "key", "k_proj", "k_lin", "wk"),
             "v": ("v", "value", "v_proj", "v_lin", "wv")}  # fmt: skip
    return next((letter for letter, known in words.items() if name.casefold() in known), "")


def require_peft() -> None:
    """Say which command installs peft.

    Raises:
        MissingExtra: It is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtra("Adapters are built by peft, which is not installed. Run: pip install 'easyeditor[train]'.")
