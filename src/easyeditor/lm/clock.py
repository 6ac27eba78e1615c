"""Where the seconds go: parts of the work name themselves, and whoever listens gets their times.

Nothing is measured when nobody listens. A part inside another one counts for itself only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """What a listener hears.

    Args:
        seconds: Part -> seconds spent in it, without the parts inside.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    inside: list[float] = field(default_factory=list)  # of each open part, the seconds of the parts inside


_LISTENER: ContextVar[Times | None] = ContextVar("listener", default=None)


@contextmanager
def listening() -> Iterator[Times]:
    """A context whose parts are timed; listening inside listening hears the inner part alone."""
    times = Times()
    token = _LISTENER.set(times)
    try:
        yield times
    finally:
        _LISTENER.reset(token)


@contextmanager
def spent(part: str) -> Iterator[None]:
    """A context, or a decorator, whose seconds count as those of a part of the work.

    Args:
        part: Its name, such as ``values``.
    """
    times = _LISTENER.get()
    if times is None:
        yield
        return
    times.inside.append(0.0)
    start = now()
    try:
        yield
    finally:
        whole = now() - start
        own = whole - times.inside.pop()
        times.seconds[part] = times.seconds.get(part, 0.0) + own
        if times.inside:
            times.inside[-1] += whole


def now() -> float:
    """Seconds of a clock that waits for the accelerator, if there is one."""
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and accelerator.is_available():
        accelerator.synchronize()
    return time.perf_counter()
