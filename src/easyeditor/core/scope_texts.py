"""Texts that SERAC learns from: some that a fact is about, and some that it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.core.counterfactual import Asked, Question, asked
from easyeditor.core.rehearsal import probes_of
from easyeditor.core.scope_classifier import Scope
from easyeditor.core.training import Visit
from easyeditor.lm.model import LM


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts with answers that an edit learns from.

    Args:
        pairs: Prompt, as the model is asked, and answer.
        asked: The same as tokens.
        owner: The fact that each belongs to, (texts,).
        wanted: Whether it asks for the fact; otherwise the fact is not about it, (texts,).
        facts: Where the facts' own prompts are.
    """

    pairs: Sequence[tuple[str, str]]
    asked: Asked
    owner: Tensor
    wanted: Tensor
    facts: Sequence[int]

    def about(self) -> Tensor:
        """Which fact is about which text, (texts, facts)."""
        own = self.owner[:, None] == torch.arange(len(self.facts), device=self.owner.device)
        return own & self.wanted[:, None]

    def outside(self, all_negatives: bool) -> list[Tensor]:
        """Which fact is not about which text, (texts, facts): of its own probes, and of all other texts if wanted."""
        own = self.owner[:, None] == torch.arange(len(self.facts), device=self.owner.device)
        wordings: list[set[str]] = [set() for _ in self.facts]
        for (prompt, _), owner, wanted in zip(self.pairs, self.owner.tolist(), self.wanted.tolist(), strict=True):
            if wanted:
                wordings[owner].add(prompt)
        other = torch.tensor([[prompt not in known for known in wordings] for prompt, _ in self.pairs]).to(own.device)
        return [own & other, ~own & other] if all_negatives else [own & other]

    def alike(self, lm: LM, scope: Scope) -> tuple[Tensor, Tensor]:
        """The logarithm of how alike each text is to each fact, where its prompt ends and at most, (texts, facts)."""
        read = [text[:split] for text, split in zip(self.asked.texts, self.asked.splits, strict=True)]
        found: Tensor = scope(lm, [self.asked.prompt(row) for row in self.facts], read)  # (texts, longest, facts)
        lengths = torch.tensor([len(text) for text in read], device=found.device)
        there = torch.arange(found.shape[1], device=found.device) < lengths[:, None]
        last = torch.tensor(self.asked.ends, device=found.device) - 1
        ends = found[torch.arange(len(last), device=found.device), last]
        return ends, found.masked_fill(~there[..., None], -torch.inf).amax(1)

    def questions(self, rows: Tensor, facts: Tensor) -> list[Question]:
        """What the answers of some texts, (texts,) bool, would be if a fact of each, (texts,), were so."""
        return [
            Question(
                self.asked.prompt(self.facts[fact]),
                self.asked.answers[self.facts[fact]],
                self.asked.texts[row],
                self.asked.splits[row],
                self.asked.places(row),
            )
            for row, (fact, wanted) in enumerate(zip(facts.tolist(), rows.tolist(), strict=True))
            if wanted
        ]

    def told(self) -> tuple[Tensor, Tensor]:
        """Of each token of the new answers the text, counted among those that ask, and the token, (tokens,) each."""
        rows = self.asked.batch.rows
        wanted = self.wanted[rows]
        return (self.wanted.cumsum(0) - 1)[rows[wanted]], self.asked.batch.labels[wanted]


def drawn(lm: LM, group: Sequence[Visit], seed: int, rephrases: int, most: int) -> Texts:
    """Of each request its prompt, some wordings, some probes, and another request's prompt."""
    pairs: list[tuple[str, str]] = []
    owner: list[int] = []
    wanted: list[bool] = []
    facts: list[int] = []
    for fact, visit in enumerate(group):
        request, rng = visit.request, visit.drawing(seed)
        own, probes = request.rephrase_prompts, probes_of(visit, seed)
        wordings = (request.prompt, *rng.sample(own, min(rephrases, len(own))))
        near = [(p.prompt, p.answers[0] if p.answers else ".") for p in rng.sample(probes, min(most, len(probes)))]
        if visit.other is not None:
            near.append((visit.other.prompt, visit.other.ground_truth or "."))
        facts.append(len(pairs))
        pairs += [(lm.text.render(p), a) for p, a in [*((prompt, request.target_new) for prompt in wordings), *near]]
        owner += [fact] * (len(wordings) + len(near))
        wanted += [*[True] * len(wordings), *[False] * len(near)]
    place = lm.device
    return Texts(pairs, asked(lm, pairs), torch.tensor(owner, device=place), torch.tensor(wanted, device=place), facts)


def mean_of(values: Tensor, owner: Tensor) -> Tensor:
    """The mean of the values of each owner that has some, (owners,)."""
    count = torch.bincount(owner)
    total = torch.zeros(len(count), device=values.device).index_add(0, owner, values)
    return (total / count)[count > 0]
