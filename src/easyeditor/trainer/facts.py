"""What an editor is trained on: requests from wherever, in an order that depends on the seed and the place alone."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping
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

    Facts that are edited together have prompts of their own as far as there are enough: a set may hold a fact with
    several new answers, and they cannot all hold at once.

    Args:
        requests: The set.
        size: Requests per batch.
        seed: Draws the order of each epoch.
    """

    def __init__(self, requests: list[EditRequest], size: int, seed: int) -> None:
        self.requests, self.size, self.seed = requests, min(size, len(requests)), seed
        self.per_epoch = len(requests) // self.size
        self._drawn: tuple[int, list[int]] = (-1, [])

    def batch(self, number: int) -> list[Visit]:
        """One batch of the endless sequence of epochs."""
        epoch, at = divmod(number, self.per_epoch)
        if self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            places = torch.randperm(len(self.requests), generator=generator).tolist()
            self._drawn = epoch, self._apart(places)
        places = self._drawn[1][at * self.size : (at + 1) * self.size]
        return [visit(self.requests, place, epoch, self.seed) for place in places]

    def _apart(self, places: list[int]) -> list[int]:
        """The places in their order, but one that would repeat a prompt of its batch comes in the next."""
        waiting, found = deque(places), list[int]()
        while waiting:
            batch, later = dict[str, int](), list[int]()
            while waiting and len(batch) < self.size:
                place = waiting.popleft()
                if batch.setdefault(self.requests[place].prompt, place) != place:
                    later.append(place)
            missing = self.size - len(batch)
            found += [*batch.values(), *later[:missing]]
            waiting.extendleft(reversed(later[missing:]))
        return found


def visit(requests: list[EditRequest], place: int, epoch: int | None, seed: int) -> Visit:
    """One request of a set, with another one of it."""
    rng = Random(f"{seed}/other/{place}")
    other = (place + 1 + rng.randrange(len(requests) - 1)) % len(requests) if len(requests) > 1 else None
    return Visit(requests[place], place, epoch, None if other is None else requests[other])
