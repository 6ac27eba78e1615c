"""The parts of a run on a Ray cluster: each worker holds the model once and does one part after the other.

All workers write into the run folder, each into files of its own, so that folder must be one that all of them see. A
part whose worker dies is given to another, which goes on from what is in the folder.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from easyeditor.bench.folder import opened
from easyeditor.bench.job import Part
from easyeditor.bench.plan import Plan
from easyeditor.bench.runner import Runner, parts_of
from easyeditor.editors.progress import tracked
from easyeditor.errors import EditFailed, MissingExtra, UsageError
from easyeditor.lm.model import LM
from easyeditor.requests import EditRequest

PIECES = 4  # of a row and a seed for each worker: small enough that none waits long for the last
TRIES = 3  # workers that may die over one part
STORE = 100 * 2**20  # bytes for what is sent to workers, which is little


class Worker:
    """Does parts in a process of its own.

    Args:
        plan: The run.
        pool: The facts to choose from.
        folder: Of the run.
    """

    def __init__(self, plan: Plan, pool: Sequence[EditRequest], folder: Path) -> None:
        from easyeditor.bench.experiment import loaded, session_of

        writer = f"-{socket.gethostname()}-{os.getpid()}"
        self.runner = Runner(plan, pool, loaded(plan), folder, writer)
        self.session = session_of(self.runner.lm)

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What makes the run, and this process."""
        return self.runner.header(), self.session

    def missing(self, parts: Sequence[Part]) -> list[int]:
        """How many lines each part lacks."""
        return [self.runner.job(part).missing for part in parts]

    def work(self, part: Part) -> int:
        """Do a part; how many lines were made."""
        return sum(1 for _ in self.runner.work(part))


def spread_out(plan: Plan, pool: Sequence[EditRequest], model: str | LM, folder: Path, where: str) -> None:
    """Do a run on a cluster.

    Args:
        plan: The run.
        pool: The facts to choose from.
        model: A model that each worker can load.
        folder: Of the run; all workers see it.
        where: ``local`` or ``local:N``: N workers on this machine; else the address of a Ray cluster.

    Raises:
        UsageError: The model is one that was passed, or `where` is nothing of this kind.
        MissingExtra: Ray is not installed.
        EditFailed: Workers die again and again over one part.
    """
    if isinstance(model, LM):
        raise UsageError("A cluster's workers load the model themselves. Pass its folder or its name, not the model.")
    with connected(where) as (ray, count):
        crew = _Crew(ray, count, plan, pool, folder.resolve())
        header, session = crew.ask("about")
        with opened(folder, header, {**session, "workers": count}):
            parts = parts_of(plan, PIECES * count)
            left = [(part, n) for part, n in zip(parts, crew.ask("missing", parts), strict=True) if n]
            waves = [[part for part, _ in left if (part.row.control == "unedited") == first] for first in (True, False)]
            done = (line for wave in waves for line in crew.do(wave))  # the answers before come first: all share them
            for _ in tracked(done, sum(n for _, n in left), "bench"):
                pass


class _Crew:
    """Workers, each with at most one part at a time."""

    def __init__(self, ray: Any, count: int, plan: Plan, pool: Sequence[EditRequest], folder: Path) -> None:
        self.ray, self.given = ray, (plan, list(pool), folder)
        device = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        self.make = ray.remote(num_cpus=1, **device)(Worker)
        self.idle = [self._new() for _ in range(count)]

    def _new(self) -> Any:
        return self.make.remote(*self.given)

    def ask(self, what: str, *given: Any) -> Any:
        """What the first worker answers."""
        with _plain_errors(self.ray):
            return self.ray.get(getattr(self.idle[0], what).remote(*given))

    def do(self, parts: Sequence[Part]) -> Iterator[int]:
        """Do parts; one number for each line, when its part is finished."""
        waiting = deque((part, TRIES) for part in parts)
        busy: dict[Any, tuple[Any, Part, int]] = {}
        while waiting or busy:
            while waiting and self.idle:
                worker, (part, tries) = self.idle.pop(), waiting.popleft()
                busy[worker.work.remote(part)] = worker, part, tries
            (finished, *_), _ = self.ray.wait(list(busy), num_returns=1)
            worker, part, tries = busy.pop(finished)
            try:
                with _plain_errors(self.ray):
                    made = self.ray.get(finished)
            except self.ray.exceptions.RayActorError:
                if tries == 1:
                    raise EditFailed(
                        f"{TRIES} workers have died over {part.row.name}, seed {part.seed}; memory may be short. All "
                        "finished cases are safe: run the same command again, perhaps with fewer workers."
                    ) from None
                self.idle.append(self._new())
                waiting.appendleft((part, tries - 1))
                continue
            self.idle.append(worker)
            yield from range(made)


@contextmanager
def connected(where: str) -> Iterator[tuple[Any, int]]:
    """A context with Ray, and how many workers it is good for: one per accelerator, else one per machine.

    What Ray has to remark goes to stderr: stdout is for results.

    Raises:
        UsageError: `where` is not understood, or nothing answers there.
        MissingExtra: Ray is not installed.
    """
    kind, _, number = where.partition(":")
    if kind == "local" and number and (not number.isdigit() or int(number) < 1):
        raise UsageError(f"--cluster '{where}' is not understood. Pass local, local:N, or the address of a cluster.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = import_module("ray")
    except ImportError:
        raise MissingExtra("--cluster needs Ray. Install it: pip install 'easyeditor[cluster]'.") from None
    with redirect_stdout(sys.stderr):
        count = _joined(ray, where)
        try:
            yield ray, count
        finally:
            ray.shutdown()


def _joined(ray: Any, where: str) -> int:
    """Start a cluster on this machine, or join one; how many workers it is good for."""
    kind, _, number = where.partition(":")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if kind == "local":
        count = int(number or 2)
        ray.init(address="local", num_cpus=count, object_store_memory=STORE, **quiet)
        return count
    try:
        ray.init(address=where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"No Ray cluster answers at '{where}' ({str(error).splitlines()[0]}).") from None
    return int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes())


@contextmanager
def _plain_errors(ray: Any) -> Iterator[None]:
    """Errors of a worker as it raised them."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
