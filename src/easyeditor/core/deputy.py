"""A small model that answers in the place of a large one where a memory of facts is concerned. arXiv:2206.06520.

The large model is run as it is. Where a fact of the memory is about the text so far, its probabilities are mixed with
those of the small one, or give way to them. A cache of the model remembers which tokens it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.core.counterfactual import TINY, Networks, Question, asked, networks
from easyeditor.core.passes import Place, Seen, places_of, read, remember, with_logits
from easyeditor.core.scope_classifier import FEW, HALF, Tokens, standing
from easyeditor.errors import DamagedFile, UsageError
from easyeditor.lm.model import LM, logits_of


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts and the networks that know what to do with them. A wrapper of a `ModuleEdit` around the head.

    Args:
        facts: Prompt, as the model is asked, and answer.
        soft: Whether probabilities are mixed; otherwise one model or the other speaks.
        spec: What the networks look like; see `easyeditor.core.counterfactual.networks`.
        weights: Their state; edits of one archive share it.
    """

    facts: Sequence[tuple[str, str]]
    soft: bool
    spec: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """The state of the networks."""
        return dict(self.weights)

    def config(self) -> dict[str, Any]:
        """The rest."""
        return {"facts": [list(fact) for fact in self.facts], "soft": self.soft, "spec": dict(self.spec)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Facts:
        """The facts with this state and this rest."""
        return cls([(prompt, answer) for prompt, answer in config["facts"]], config["soft"], config["spec"], tensors)

    @classmethod
    def combined(cls, wrappers: list[Facts]) -> Deputy:
        """What speaks for the facts of all wrappers, oldest first."""
        found = Deputy()
        found.become(wrappers)
        return found

    def fits(self, other: Facts) -> bool:
        """Whether two can be in one memory."""
        if (
            self.soft != other.soft
            or dict(self.spec) != dict(other.spec)
            or self.weights.keys() != other.weights.keys()
        ):
            return False
        pairs = ((tensor, other.weights[name]) for name, tensor in self.weights.items())
        return all(a is b or torch.equal(a, b.to(a.device)) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Told:
    """The facts of a memory as the networks read them.

    Args:
        prompts: Their prompts, each once.
        answers: Their answers; of two facts with one prompt the newer holds.
        keys: The vectors of the prompts, (facts, width); None where there are none.
    """

    prompts: Sequence[Tokens]
    answers: Sequence[Tokens]
    keys: Tensor | None


class Deputy:
    """The memory of all facts on a model, and what is done where one of them counts."""

    def __init__(self) -> None:
        self.entries: list[Facts] = []
        self._networks: Networks | None = None
        self._keys: dict[tuple[int, ...], Tensor] = {}  # prompt -> its vector
        self._memory: Told | None = None

    def become(self, entries: Sequence[Facts]) -> None:
        """Speak for these, oldest first.

        Raises:
            UsageError: They were made with different networks; all is as before.
        """
        first, known = entries[0], {id(entry) for entry in self.entries}
        same = bool(self.entries) and first.fits(self.entries[0])
        if not all((same and id(entry) in known) or entry.fits(first) for entry in entries):
            raise UsageError(
                "Two edits of SERAC were made with different archives or settings. Make both with the same archive, or "
                "take the first back."
            )
        if not same:
            self._networks, self._keys = None, {}
        self.entries, self._memory = list(entries), None

    def attach(self, lm: LM) -> Attached:
        """Put it to work on a model, until what this returns is removed."""

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._spoken(lm, read(lm, args, kwargs, output), kwargs, output)

        handles = [lm.model.register_forward_hook(after, with_kwargs=True)]
        if lm.seq2seq:
            handles.append(lm.model.get_encoder().register_forward_hook(remember, with_kwargs=True))  # type: ignore[operator]
        return Attached(handles)

    def _spoken(self, lm: LM, seen: Seen, kwargs: Mapping[str, Any], output: Any) -> Any:
        """The model's output, with other logits where a fact counts."""
        logits = logits_of(output)
        with torch.no_grad():
            found = self._answered(lm, seen, places_of(lm, seen, logits))
        if found is None:
            return None
        (rows, columns), share, logp = found
        at = rows.to(logits.device), columns.to(logits.device)
        own = logits[at].float().softmax(-1)
        share = share.to(own)[:, None]
        mixed = ((1 - share) * own + share * logp.exp().to(own) + TINY).log()
        return with_logits(lm, output, logits.index_put(at, mixed.to(logits.dtype)), kwargs.get("labels"))

    def _answered(
        self, lm: LM, seen: Seen, places: Sequence[Place]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor] | None:
        """Where in the logits facts count, (n,) twice, how much, (n,), and what is said there, (n, vocab)."""
        own = self._on(lm)
        told, rows = self._told(lm, own), sorted({place.row for place in places})
        texts = [seen.texts[row][: seen.splits[row]] for row in rows]
        if not rows:
            return None
        near, which = (x.tolist() for x in standing(own.scope(lm, told.prompts, texts, told.keys).exp()))
        index, soft = {row: i for i, row in enumerate(rows)}, self.entries[0].soft
        groups: dict[tuple[int, int], list[tuple[Place, float]]] = {}
        for place in places:
            i = index[place.row]
            token = min(place.token, len(texts[i]) - 1)
            share = near[i][token]
            if share > (FEW if soft else HALF):
                groups.setdefault((place.row, which[i][token]), []).append((place, share if soft else 1.0))
        if not groups:
            return None
        questions = [
            Question(
                told.prompts[fact], told.answers[fact], seen.texts[row], seen.splits[row], [p.token for p, _ in group]
            )
            for (row, fact), group in groups.items()
        ]
        found = [pair for group in groups.values() for pair in group]
        rows_, columns = torch.tensor([place.at for place, _ in found]).T
        return (rows_, columns), torch.tensor([share for _, share in found]), own.counterfactual(lm, questions)

    def _on(self, lm: LM) -> Networks:
        if self._networks is None:
            self._networks = built(self.entries[0].spec, self.entries[0].weights).to(lm.device)
        return self._networks

    def _told(self, lm: LM, own: Networks) -> Told:
        """The memory; what it was before is used again."""
        if self._memory is None:
            facts = asked(lm, [fact for entry in self.entries for fact in entry.facts])
            newest = {tuple(facts.prompt(i)): facts.answers[i] for i in range(len(facts.texts))}
            keys = None
            if not own.scope.measure.cross_attend:
                if new := [prompt for prompt in newest if prompt not in self._keys]:
                    self._keys |= dict(zip(new, own.scope.keys(lm, new), strict=True))
                keys = torch.stack([self._keys[prompt] for prompt in newest])
            self._memory = Told(list(newest), list(newest.values()), keys)
        return self._memory


@dataclass(frozen=True)
class Attached:
    """What hangs on a model.

    Args:
        handles: Of the hooks.
    """

    handles: Sequence[Any]

    def remove(self) -> None:
        """Take all of it off."""
        for handle in self.handles:
            handle.remove()


def built(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Networks:
    """The networks of a description with a state.

    Raises:
        DamagedFile: The state is not theirs.
    """
    found = networks(spec)
    try:
        found.load_state_dict(dict(weights))
    except RuntimeError:
        raise DamagedFile(
            "What SERAC has learnt does not fit its own description. Restore the folder from a copy, or train again."
        ) from None
    return found.requires_grad_(False).eval()
