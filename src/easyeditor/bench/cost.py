"""What an edit costs: seconds by part, memory at its peak, bytes, and what it adds to each generated token."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import Ledger
from easyeditor.lm.clock import listening, now
from easyeditor.lm.generate import continuations
from easyeditor.lm.model import LM

PARTS = ("keys", "values", "solve", "gradients", "training", "apply")  # what is timed by name; the rest is "other"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOKENS, ROUNDS = 16, 5  # of the measurement of latency


@dataclass
class Cost:
    """What a step of a run cost.

    Args:
        seconds: Part -> seconds; ``edit`` is all of the edit.
        memory: ``cpu`` and ``device``: bytes at the peak of the edit, of the process and on the accelerator; None where
            it cannot be known.
        nbytes: Bytes of the edits that were made.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    nbytes: int = 0

    def share(self, facts: int) -> dict[str, Any]:
        """What falls to one of so many facts; memory is that of all together."""
        seconds = {part: value / facts for part, value in self.seconds.items()}
        return {"seconds": seconds, "memory": self.memory, "bytes": round(self.nbytes / facts)}


@contextmanager
def measured(lm: LM) -> Iterator[Cost]:
    """A context in which an edit is made; its cost is known after it."""
    cost = Cost()
    device = torch.get_device_module(lm.device.type)
    reset = _reset_peak()
    if hasattr(device, "reset_peak_memory_stats"):
        device.reset_peak_memory_stats(lm.device)
    start = now()
    with listening() as times:
        try:
            yield cost
        finally:
            whole = now() - start
            named = {part: times.seconds.get(part, 0.0) for part in PARTS}
            cost.seconds |= {"edit": whole, **named, "other": max(whole - sum(named.values()), 0.0)}
            peak = getattr(device, "max_memory_allocated", None)
            cost.memory |= {"cpu": _peak() if reset else _ever(), "device": peak(lm.device) if peak else None}


def bytes_of(edits: Sequence[Edit]) -> int:
    """Bytes of the tensors of edits, and of their text where they have none."""
    return sum(
        sum(t.numel() * t.element_size() for t in edit.tensors().values())
        or len(json.dumps(edit.config(), default=str).encode())
        for edit in edits
    )


def latency(lm: LM, prompt: str) -> dict[str, float]:
    """Seconds per generated token with the edits that are on a model and without them, the prompt's pass included.

    Args:
        lm: The model.
        prompt: The question that is answered, with a fixed number of tokens.

    Returns:
        ``with`` and ``without``: the best of rounds that take turns; all else is the noise of a busy machine.
    """
    found: dict[str, list[float]] = {"with": [], "without": []}
    _generate(lm, prompt)
    for _ in range(ROUNDS):
        found["with"].append(_generate(lm, prompt))
        with Ledger.of(lm).suspended():
            found["without"].append(_generate(lm, prompt))
    return {which: min(seconds) / TOKENS for which, seconds in found.items()}


def machine(lm: LM | None = None) -> dict[str, Any]:
    """The machine, in the words of its system."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _total(),
    }
    if lm is not None:
        device = torch.get_device_module(lm.device.type)
        name = getattr(device, "get_device_name", None)
        found["device"] = name(lm.device) if name else lm.device.type
    return found


def versions() -> dict[str, str]:
    """The versions of what computes."""
    import transformers

    from easyeditor.edits.store import library_version

    return {
        "easyeditor": library_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _generate(lm: LM, prompt: str) -> float:
    ids = list(lm.text.encode(lm.rewrite(prompt)).ids)
    plain = next((i for i in reversed(ids) if i not in lm.text.eos_ids and "\n" not in lm.text.decode([i])), ids[-1])

    def choose(logits: Tensor) -> Tensor:
        return torch.full((len(logits),), plain, device=logits.device)

    start = now()
    continuations(lm, [ids], TOKENS, choose=choose)
    return now() - start


def _reset_peak() -> bool:
    """Let the system forget the highest memory of this process; Linux can."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return _ever()


def _ever() -> int | None:
    """The highest memory since the process began."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _total() -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
