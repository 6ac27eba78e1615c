"""The one optimisation loop: Adam on a few tensors, several independent problems at once, each with its own stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from easyeditor.lm.clock import spent


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
    adam = torch.optim.Adam(parameters, lr=lr)
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
            parameter.grad = gradient
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
