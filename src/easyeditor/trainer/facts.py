"""What an editor is trained on: requests from wherever, in an order that depends on the seed and the place alone."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from easyeditor.core.training import Visit
from easyeditor.data.named import named_facts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

HELD_OUT = 10  # one request in so many validates where there is no validation set


def requests_of(source: Any, what: str) -> list[EditRequest]:
    """The requests of a data set.

    Args:
        source: A file, a name such as ``tinyfacts:tuning:6``, a data set of `easyeditor.data` or of torch around one,
            or a list of requests, of dicts in the layout of existing scripts or of items of a data set.
        what: How errors call it.

    Raises:
        UsageError: There is none, or one is wrong; the message names record, field and remedy.
    """
    if isinstance(source, str | Path):
        found = named_facts(str(source))
    elif callable(getattr(source, "requests", None)):
        found = list(source.requests())
    elif (rows := _rows(source)) is not None:
        found = [
            row if isinstance(row, EditRequest) else EditRequest.from_dict(_of_item(row), f"{what}, record {i}")
            for i, row in enumerate(rows)
        ]
    else:
        raise UsageError(
            f"{what} is a {type(source).__name__}. Pass a file, a data set of easyeditor, or a list of requests."
        )
    if not found:
        raise UsageError(f"{what} holds no requests. Give some, each with 'prompt' and 'target_new'.")
    return found


def _rows(source: Any) -> list[Any] | None:
    """What a data set holds; None: it is none."""
    if isinstance(source, Mapping):
        return None
    if isinstance(source, Iterable):
        return list(source)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):  # a data set of torch need not be iterable
        return [source[place] for place in range(len(source))]
    return None


def _of_item(row: Any) -> Any:
    """A dict as `EditRequest.from_dict` takes it: the items of some data sets have their probe in fields of its own."""
    if not isinstance(row, Mapping) or "locality_prompt" not in row:
        return row
    rest = {
        name: value for name, value in row.items() if name not in ("cond", "locality_prompt", "locality_ground_truth")
    }
    if row["locality_prompt"] is None:
        return rest
    probe = {"prompt": row["locality_prompt"], "ground_truth": row.get("locality_ground_truth")}
    return {**rest, "locality": {**(row.get("locality") or {}), "locality": probe}}


def split(requests: list[EditRequest], seed: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """Requests to train on, and a tenth to validate with; requests about one subject stay together."""
    names = sorted({request.subject or request.prompt for request in requests})
    if len(names) < 2:
        return requests, requests
    held = set(Random(f"{seed}/held out").sample(names, max(len(names) // HELD_OUT, 1)))
    train = [request for request in requests if (request.subject or request.prompt) not in held]
    return train, [request for request in requests if (request.subject or request.prompt) in held]


def digest_of(*sets: list[EditRequest]) -> str:
    """A hash of some sets, to tell whether a training goes on with what it began with."""
    text = json.dumps([[request.to_dict() for request in each] for each in sets], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Order:
    """The batches of a training set, epoch by epoch.

    Args:
        requests: The set.
        size: Requests per batch.
        seed: Draws the order of each epoch.
    """

    def __init__(self, requests: list[EditRequest], size: int, seed: int) -> None:
        self.requests, self.size, self.seed = requests, room(requests, size), seed
        self.per_epoch = len(requests) // self.size
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, number: int) -> list[Visit]:
        """One batch of the endless sequence of epochs."""
        epoch, at = divmod(number, self.per_epoch)
        if self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.requests), generator=generator).tolist()
            self._drawn = epoch, batches(self.requests, order, self.size)
        return [visit(self.requests, place, epoch, self.seed) for place in self._drawn[1][at]]


def room(requests: list[EditRequest], size: int) -> int:
    """How many requests of a set can be edited together, at most `size`: those with prompts of their own."""
    return min(size, len({request.prompt for request in requests}))


def batches(requests: list[EditRequest], order: Sequence[int], size: int) -> list[list[int]]:
    """Places of a set, batch by batch; facts of one prompt and several answers cannot hold together.

    Args:
        requests: The set.
        order: The places, which stay in this order, but for one that would repeat a prompt of its batch: it comes in a
            later one, as long as there are others.
        size: Requests per batch.
    """
    waiting, found = deque(order), list[list[int]]()
    while waiting:
        batch, later = dict[str, int](), list[int]()
        while waiting and len(batch) < size:
            place = waiting.popleft()
            if batch.setdefault(requests[place].prompt, place) != place:
                later.append(place)
        missing = size - len(batch)
        found.append([*batch.values(), *later[:missing]])
        waiting.extendleft(reversed(later[missing:]))
    return found


def visit(requests: list[EditRequest], place: int, epoch: int | None, seed: int) -> Visit:
    """One request of a set, with another one of it."""
    rng = Random(f"{seed}/other/{place}")
    other = (place + 1 + rng.randrange(len(requests) - 1)) % len(requests) if len(requests) > 1 else None
    return Visit(requests[place], place, epoch, None if other is None else requests[other])
