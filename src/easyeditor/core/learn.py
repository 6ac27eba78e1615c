"""The one optimisation loop: Adam on a few tensors, over independent problems or over mini-batches of requests.

Gradients and Adam's moments exist for the chosen tensors only and as long as the call. What passes below the lowest
trained block is computed once (`Minibatch`), and the head sees answer positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from easyeditor.core.likelihood import answers, mean_per_row, token_log_probs
from easyeditor.errors import NonFinite, UsageError
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.resume import Cut, cut_at, resumed
from easyeditor.lm.structure import Site
from easyeditor.requests import EditRequest

SOLVED = 1e-2  # a loss below which a batch is learnt


class Problems:
    """Independent problems that Adam moves together, each of which can stop and leave.

    Args:
        start: Where they begin; the first dimension counts them.
        lr: Adam's step size.

    Attributes:
        current: Where they are; gradients flow into it.
        moving: Which of them have not stopped, (problems,), bool.
    """

    def __init__(self, start: Tensor, lr: float) -> None:
        self.current = start.detach().clone().requires_grad_(True)
        self.moving = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self._adam = torch.optim.Adam([self.current], lr=lr)

    def stop(self, which: Tensor) -> None:
        """Leave some problems where they are from now on."""
        self.moving &= ~which.to(self.moving.device)

    def step(self, losses: Tensor) -> None:
        """Move the moving problems down their losses, (problems,)."""
        moving = self.moving.to(losses.device)
        (self.current.grad,) = torch.autograd.grad(losses[moving].sum(), [self.current])
        before = self.current.detach().clone()
        self._adam.step()
        with torch.no_grad():
            self.current[~self.moving] = before[~self.moving]

    def keep(self, which: Tensor) -> None:
        """Go on with some of the problems only; each keeps its moments."""
        state, lr = self._adam.state[self.current], self._adam.param_groups[0]["lr"]
        self.current = self.current.detach()[which].clone().requires_grad_(True)
        self._adam = torch.optim.Adam([self.current], lr=lr)
        moments = {name: value[which].clone() for name, value in state.items() if name != "step"}
        self._adam.state[self.current] = {"step": state["step"], **moments}
        self.moving = self.moving[which]


@spent("training")
def descend(
    parameters: Sequence[Tensor],
    losses: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    stop_below: float | None = None,
    project: Callable[[], None] | None = None,
    done: Callable[[], bool] | None = None,
    final_update: bool = False,
) -> list[list[float]]:
    """Minimise independent losses with Adam.

    In every step the losses are computed first; a problem whose loss is below the bound is not moved in that step, and
    when none is left to move, it is over. The last step computes losses only, so that ``steps`` forward passes make
    ``steps - 1`` updates, unless a final update is asked for.

    Args:
        parameters: What is optimised, in place; with several problems their first dimension counts the problems.
        losses: Computes one loss per problem, (problems,).
        steps: How often the losses are computed.
        lr: Adam's step size.
        stop_below: The loss at which a problem is solved; None: never.
        project: Called after each update, to keep the parameters in bounds.
        done: Called after each computation of the losses; says whether to end, instead of the rule above.
        final_update: Whether the last step moves the parameters too.

    Returns:
        For each step the loss of each problem.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    alone = all(parameter.device.type == "cpu" for parameter in parameters)
    adam = torch.optim.Adam(parameters, lr=lr, fused=True if alone else None)  # in one pass over memory, not in ten
    trace: list[list[float]] = []
    for step in range(steps):
        with torch.enable_grad():
            loss = losses()
        trace.append(loss.detach().float().tolist())
        running = torch.ones_like(loss, dtype=torch.bool) if stop_below is None else loss.detach() >= stop_below
        finished = done() if done is not None else not running.any()
        if finished or (step == steps - 1 and not final_update):
            break
        if not running.any():
            continue
        gradients = torch.autograd.grad(loss[running].sum(), parameters)
        before = [parameter.detach().clone() for parameter in parameters] if not running.all() else []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()  # the fused step takes one layout for both
        adam.step()
        with torch.no_grad():
            if project is not None:
                project()
            for parameter, old in zip(parameters, before, strict=False):
                parameter[~running] = old[~running]
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return trace


class Minibatch:
    """Some answers to learn, with what passes below the lowest trained block already computed.

    Args:
        lm: The model, as it is before the training.
        pairs: Prompt, as the model is asked it, and answer.
        first: The lowest block whose output changes in the training.
        at_prompt_end: Whether all tokens of an answer are predicted from the prompt's last token (FT-L).
        with_end: Whether the end-of-text token belongs to the answer.
    """

    def __init__(
        self,
        lm: LM,
        pairs: Sequence[tuple[str, str]],
        first: int = 0,
        *,
        at_prompt_end: bool = False,
        with_end: bool = False,
    ) -> None:
        self.lm = lm
        self.answers = answers(lm, pairs, at_prompt_end, with_end)
        self.cut = Cut(0) if lm.seq2seq else self._below(first)

    def _below(self, first: int) -> Cut:
        if first == 0:
            return Cut(0)
        with torch.no_grad(), cut_at(self.lm, first) as cut, stop_after(self.lm.blocks[first - 1]):
            self.lm.run(self.answers.ids, self.answers.mask)
        return cut

    def log_probs(self) -> Tensor:
        """The log-probability of each answer token, (tokens,), fp32."""
        with resumed(self.lm, self.cut, self.cut.states) if self.cut.first else nullcontext():
            return token_log_probs(self.lm, self.answers)

    def loss(self) -> Tensor:
        """The mean over the requests of the mean over the answer's tokens of -log p, a scalar."""
        return -mean_per_row(self.log_probs(), self.answers).mean()


def minibatches(lm: LM, requests: Sequence[EditRequest], size: int, first: int = 0, **options: bool) -> list[Minibatch]:
    """Requests in their order, so many at a time; the options are those of `Minibatch`."""
    pairs = [(lm.text.render(request.prompt), request.target_new) for request in requests]
    return [Minibatch(lm, pairs[i : i + size], first, **options) for i in range(0, len(pairs), size)]


def train(
    parameters: Sequence[Tensor],
    batches: Sequence[Callable[[], Tensor]],
    *,
    epochs: int,
    lr: float,
    stop_below: float | None = SOLVED,
    penalty: Callable[[], Tensor] | None = None,
    project: Callable[[], None] | None = None,
) -> list[float]:
    """Adam over mini-batches, epoch by epoch.

    A batch whose loss is below the bound is skipped, and the training is over when the mean loss of an epoch is.

    Args:
        parameters: What is trained, in place.
        batches: Computes the loss of each mini-batch, a scalar.
        epochs: How often each batch is seen, at most.
        lr: Adam's step size.
        stop_below: The bound; None: there is none.
        penalty: What is added to each loss, a scalar.
        project: Called after each update, to keep the parameters in bounds.

    Returns:
        The mean loss of each epoch, without the penalty.

    Raises:
        NonFinite: A loss is not a finite number.
    """
    seen = _Epochs(batches, stop_below, lr)

    def losses() -> Tensor:
        found = seen.loss()
        return (found if penalty is None else found + penalty())[None]

    steps = epochs * len(batches)
    descend(
        parameters,
        losses,
        steps=steps,
        lr=lr,
        stop_below=stop_below,
        project=project,
        done=seen.done,
        final_update=True,
    )
    return seen.means


def refuse_quantised(lm: LM, sites: Sequence[Site]) -> None:
    """Refuse to train a change of weights that nothing can be added to.

    Raises:
        UsageError: A weight is held in a few bits.
    """
    for site in sites:
        if not site.weight.is_floating_point():
            raise UsageError(
                f"'{site.weight_name}' of {lm.name} is quantised ({site.weight.dtype}), and no change can be added to "
                "it. Use QLoRA, or load the full-precision checkpoint."
            )


class _Epochs:
    """Which batch comes next, and when it is enough."""

    def __init__(self, batches: Sequence[Callable[[], Tensor]], enough: float | None, lr: float) -> None:
        self.batches, self.enough, self.lr = batches, enough, lr
        self.losses: list[float] = []
        self.means: list[float] = []

    def loss(self) -> Tensor:
        value = self.batches[len(self.losses) % len(self.batches)]()
        self.losses.append(float(value.detach()))
        if not math.isfinite(self.losses[-1]):
            raise NonFinite(
                f"The loss of step {len(self.losses)} is {self.losses[-1]}; the model is as it was. Lower the "
                f"learning rate 'lr', which is {self.lr:g}, or load the model in a wider dtype."
            )
        return value

    def done(self) -> bool:
        if len(self.losses) % len(self.batches) == 0:
            self.means.append(sum(self.losses[-len(self.batches) :]) / len(self.batches))
            return self.enough is not None and self.means[-1] < self.enough
        return False
