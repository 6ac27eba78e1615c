"""What a model says after edits that nobody made: many at once, each seen by its own prompts only, differentiable.

Editors that are trained need the losses of thousands of edits. An edit is a change of low rank of some projections; a
row of the batch adds the change of its own edit to what the projection returns. What the untouched model says of a
request does not depend on the editor: it is computed once (`Before`), states below the lowest edited block included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from easyeditor.core.gradients import Factors, factors
from easyeditor.core.hypernetwork import of_rows, with_gradient
from easyeditor.core.likelihood import Answers, answer_logits, answers
from easyeditor.core.training import Visit
from easyeditor.errors import UsageError
from easyeditor.lm.hooks import by_row, hidden
from easyeditor.lm.model import LM
from easyeditor.lm.resume import Cut, cut_at, resumed
from easyeditor.lm.structure import Site
from easyeditor.requests import EditRequest, Probe

T = TypeVar("T")
Questions = tuple[Sequence[tuple[str, str]], int]  # prompt and answer of each row, and how many ask for the new answer

MOST = 6  # wordings and probes of a request that are used, of each at most


@dataclass(frozen=True, eq=False)
class Known:
    """What the untouched model says of a request.

    Args:
        pairs: Prompt and answer of each row: the prompt, its other wordings, then the probes.
        wordings: How many of the rows ask for the new answer.
        states: What passes below the lowest edited block, per row, (length, width); empty where it is not kept.
        log_probs: Of each row's tokens that must not move, (tokens, vocab): of a probe's answer and of what follows it,
            of a wording what follows the new answer.
    """

    pairs: Sequence[tuple[str, str]]
    wordings: int
    states: Sequence[Tensor]
    log_probs: Sequence[Tensor]


class Before:
    """What the untouched model says of requests; kept as long as there is room.

    Args:
        lm: The model, without edits.
        sites: The projections that are edited.
        tokens: Which tokens have factors; see `easyeditor.core.gradients.factors`.
        room: How many bytes.
        seed: Draws what stands in for a probe that is not there.
    """

    def __init__(self, lm: LM, sites: Sequence[Site], tokens: str, room: float, seed: int = 0) -> None:
        self.lm, self.sites, self.tokens, self.room, self.seed = lm, sites, tokens, room, seed
        self.first = 0 if lm.seq2seq or lm.sequence_first else min(lm.block_of(site) for site in sites)
        self._known: dict[tuple[bool, int], Known] = {}
        self._factors: dict[tuple[bool, int], dict[str, Factors]] = {}

    def __call__(self, visit: Visit) -> Known:
        """What it says of a request."""
        if (known := self._known.get(visit.key)) is None:
            (known,) = self._asked([self._questions(visit)])
            self._keep(self._known, visit, known, [*known.states, *known.log_probs])
        return known

    def gradient(self, visit: Visit) -> dict[str, Factors]:
        """The factors of a request, as `factors` has them."""
        if (found := self._factors.get(visit.key)) is None:
            found = self.factors(visit.request)
            self._keep(self._factors, visit, found, [t for f in found.values() for t in (f.inputs, f.gradients)])
        return found

    def _keep(self, kept: dict[tuple[bool, int], T], visit: Visit, found: T, tensors: Sequence[Tensor]) -> None:
        size = sum(each.numel() * each.element_size() for each in tensors)
        if size <= self.room:
            self.room -= size
            kept[visit.key] = found

    def factors(self, request: EditRequest) -> dict[str, Factors]:
        """Weight name -> the factors of the loss of its new answer: the mean over its tokens of -log p."""
        batch = answers(self.lm, [(self.lm.text.render(request.prompt), request.target_new)])
        with plain_precision(self.lm):
            found = factors(self.lm, self.sites, batch, self.tokens, lambda log_probs: -log_probs.mean())
        return {site.weight_name: with_gradient(found[site.name]) for site in self.sites}

    def prompts(self, visits: Sequence[Visit]) -> frozenset[str]:
        """The prompts of some requests, as the model is asked them."""
        return frozenset(self.lm.text.render(visit.request.prompt) for visit in visits)

    def anew(self, visits: Sequence[Visit], edited: Set[str], wordings: int, probes: int) -> Rows:
        """Some rows of each request, asked in one pass and not kept: of a set that is too large for that.

        Args:
            visits: The requests; each is measured by itself.
            edited: Prompts that are edited together with them, which are no probes then.
            wordings: How many other wordings of each at most.
            probes: How many probes of each at most.
        """
        asked = [self._questions(visit) for visit in visits]
        chosen = [
            _places(visit, self.seed, each, edited, wordings, probes) for visit, each in zip(visits, asked, strict=True)
        ]
        some = [
            ([pairs[at] for at in places], sum(at < own for at in places))
            for (pairs, own), places in zip(asked, chosen, strict=True)
        ]
        known = self._asked(some)
        sizes = torch.tensor([len(places) for places in chosen])
        return Rows(
            [each for each, places in zip(known, chosen, strict=True) for _ in places],
            [at for places in chosen for at in range(len(places))],
            torch.repeat_interleave(torch.arange(len(visits)), sizes),
        )

    def _questions(self, visit: Visit) -> Questions:
        request, render = visit.request, self.lm.text.render
        wordings = (request.prompt, *request.rephrase_prompts[:MOST])
        probes = [(probe.prompt, _answer(probe)) for probe in probes_of(visit, self.seed)]
        asked = [(render(prompt), request.target_new) for prompt in wordings]
        return [*asked, *((render(prompt), answer) for prompt, answer in probes)], len(asked)

    @torch.no_grad()
    def _asked(self, questions: Sequence[Questions]) -> list[Known]:
        """What the model says of the rows of some requests, in one pass."""
        batch = answers(self.lm, [pair for pairs, _ in questions for pair in pairs], with_end=_ends(self.lm))
        with cut_at(self.lm, self.first) as cut, plain_precision(self.lm):
            logits = answer_logits(self.lm, batch)
        asked = torch.cat([torch.arange(len(pairs)) < wordings for pairs, wordings in questions])
        stays, rows = _stays(self.lm, batch, asked), range(len(batch.mask))
        log_probs = [logits[(batch.rows == row) & stays].float().log_softmax(-1) for row in rows]
        lengths = batch.mask.sum(1).tolist()
        keep = self.first > 0 and isinstance(cut.output, Tensor)
        states = [cut.states[row, :n].clone() for row, n in enumerate(lengths)] if keep else []
        found, start = [], 0
        for pairs, wordings in questions:
            mine = slice(start, start := start + len(pairs))
            found.append(Known(pairs, wordings, states[mine], log_probs[mine]))
        return found


def plain_precision(lm: LM) -> torch.autocast:
    """A context in the model's own precision: what is kept must not depend on when it was asked."""
    return torch.autocast(lm.device.type, enabled=False)


def _places(visit: Visit, seed: int, questions: Questions, edited: Set[str], wordings: int, probes: int) -> list[int]:
    """Which rows of a request are drawn for a visit: its prompt, some of its wordings and some of its probes."""
    pairs, asked = questions
    rng, others = visit.drawing(seed), range(1, asked)
    rest = [at for at in range(asked, len(pairs)) if pairs[at][0] not in edited]
    return [0, *rng.sample(others, min(wordings, len(others))), *rng.sample(rest, min(probes, len(rest)))]


def _ends(lm: LM) -> bool:
    """Whether there is a token that stands for whatever follows an answer."""
    return isinstance(getattr(lm.tokenizer, "eos_token_id", None), int) or bool(lm.text.eos_ids)


def _stays(lm: LM, batch: Answers, asked: Tensor) -> Tensor:
    """Whether what is said at a token must not move, (tokens,): at those of probes, and at the end of every row."""
    rows = batch.rows
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return ~asked.to(rows.device)[rows] | (last & _ends(lm))


def probes_of(visit: Visit, seed: int) -> list[Probe]:
    """What must not move when a request is learnt, at least one: its own probes, else an unrelated text or request.

    Raises:
        UsageError: There is nothing of the kind.
    """
    request = visit.request
    own = [probe for group in request.locality.values() for probe in group]
    if len(own) > MOST:
        own = Random(f"{seed}/{request.prompt}").sample(own, MOST)
    if not own and request.loc_prompt and len(words := request.loc_prompt.rsplit(" ", 1)) == 2:
        own = [Probe(words[0], (words[1],))]
    if not own and visit.other is not None:
        truth = visit.other.ground_truth
        own = [Probe(visit.other.prompt, (truth,) if truth else ())]
    if not own:
        raise UsageError(
            f"{request.record}: an editor learns from it what must not move, and it has no locality probe. Add "
            "'locality' (or 'loc_prompt') to the records, or give more of them: each then borrows another's prompt."
        )
    return own


def _answer(probe: Probe) -> str:
    return probe.answers[0] if probe.answers else "."  # what follows is compared at the first token of the answer too


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of some requests, each with the edit that it belongs to.

    Args:
        known: The request of each row.
        places: Which of the request's rows it is.
        edits: The edit of each row, (rows,).
    """

    known: Sequence[Known]
    places: Sequence[int]
    edits: Tensor

    @property
    def asked(self) -> Tensor:
        """Whether a row asks for a new answer, (rows,); the others are probes."""
        pairs = zip(self.known, self.places, strict=True)
        return torch.tensor([place < known.wordings for known, place in pairs])


def drawn(groups: Sequence[Sequence[tuple[Visit, Known]]], seed: int, wordings: int, probes: int) -> Rows:
    """The rows of some batches: of each request its prompt, some of its wordings and some of its probes.

    What is edited in the same batch is no probe of it.

    Args:
        groups: The requests of each batch.
        seed: Draws.
        wordings: How many other wordings of each request at most.
        probes: How many probes of each request at most.
    """
    known: list[Known] = []
    places: list[int] = []
    edits: list[int] = []
    for edit, group in enumerate(groups):
        edited = {each.pairs[0][0] for _, each in group}
        for visit, each in group:
            chosen = _places(visit, seed, (each.pairs, each.wordings), edited, wordings, probes)
            known += [each] * len(chosen)
            places += chosen
            edits += [edit] * len(chosen)
    return Rows(known, places, torch.tensor(edits))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the edited model says of some rows.

    Args:
        loss: -log p of the new answer, the mean over its tokens, (asked rows,).
        right: Whether every token of the new answer is the most probable one, (asked rows,).
        divergence: KL(before || after), the mean over a row's tokens that must not move, (rows,).
        same: The share of these tokens whose most probable one is the same as before, (rows,).
        asked: The edit of each asked row, (asked rows,).
        edits: The edit of each row, (rows,).
        probes: Whether a row is a probe, (rows,).
    """

    loss: Tensor
    right: Tensor
    divergence: Tensor
    same: Tensor
    asked: Tensor
    edits: Tensor
    probes: Tensor

    def per_edit(self, count: int) -> dict[str, Tensor]:
        """The means over the rows of each edit, under the names of existing logs, (count,)."""
        loss, kl = _mean(self.loss, self.asked, count), _mean(self.divergence, self.edits, count)
        # what follows a new answer stays nearly always and would flatter; where it is all there is, it counts
        found = torch.bincount(self.edits[self.probes], minlength=count)
        shown = self.probes | (found[self.edits] == 0)
        return {
            "loss/edit": loss,
            "loss/loc": kl,
            "edit/acc": _mean(self.right, self.asked, count),
            "edit/prob": _mean((-self.loss.detach()).exp(), self.asked, count),
            "loc/acc": _mean(self.same[shown], self.edits[shown], count),
            "loc/kl": kl.detach(),
        }


def rehearsed(lm: LM, sites: Sequence[Site], rows: Rows, changes: Mapping[str, Factors], count: int) -> Outcome:
    """What the model would say of some rows, each after its own edit.

    Args:
        lm: The model; it is left as it was.
        sites: The projections.
        rows: The rows.
        changes: Weight name -> the change of each edit as factors, whose ``rows`` name the edit.
        count: The number of edits.
    """
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(_added(lm, site, changes[site.weight_name], rows.edits, count))
        return asked_again(lm, sites, rows)


def asked_again(lm: LM, sites: Sequence[Site], rows: Rows) -> Outcome:
    """What the model says of some rows as it is now, with the projections changed and nothing below them.

    Args:
        lm: The model; it is left as it was.
        sites: The projections.
        rows: The rows.
    """
    pairs = [known.pairs[place] for known, place in zip(rows.known, rows.places, strict=True)]
    batch = answers(lm, pairs, with_end=_ends(lm))
    with lm.frozen(), ExitStack() as stack:
        stack.enter_context(_from_the_cut(lm, rows, batch, min(lm.block_of(site) for site in sites)))
        logits = answer_logits(lm, batch).float().log_softmax(-1)
    return _outcome(rows, batch, logits, _stays(lm, batch, rows.asked))


def _outcome(rows: Rows, batch: Answers, logits: Tensor, stays: Tensor) -> Outcome:
    place = logits.device
    asked, edits, row = rows.asked.to(place), rows.edits.to(place), batch.rows.to(place)
    labels, stays = batch.labels.to(place), stays.to(place)
    told = asked[row] & ~stays
    loss = -_mean(logits.gather(1, labels[:, None]).squeeze(1)[told], row[told], len(asked))
    right = _mean((logits.argmax(1) == labels)[told], row[told], len(asked)) == 1
    old = torch.cat([known.log_probs[at] for known, at in zip(rows.known, rows.places, strict=True)]).to(place)
    new, where = logits[stays], row[stays]
    kl = _mean((old.exp() * (old - new)).sum(1), where, len(asked))
    same = _mean(old.argmax(1) == new.argmax(1), where, len(asked))
    return Outcome(loss[asked], right[asked].float(), kl, same, edits[asked], edits, ~asked)


@contextmanager
def _from_the_cut(lm: LM, rows: Rows, batch: Answers, first: int) -> Iterator[None]:
    if not all(known.states for known in rows.known):
        yield
        return
    states = [known.states[place] for known, place in zip(rows.known, rows.places, strict=True)]
    padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True)  # hidden by the mask, like the pads of tokens
    with resumed(lm, Cut(first, padded), padded):
        yield


@contextmanager
def _added(lm: LM, site: Site, change: Factors, edits: Tensor, count: int) -> Iterator[None]:
    """A context in which each row's own change, of low rank, is part of what a projection returns."""
    left, right = _stacked(change, count)
    place, rows = site.weight.device, len(edits)
    left, right = left[edits.to(left.device)].to(place), right[edits.to(right.device)].to(place)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        h = by_row(hidden(args), rows, lm.sequence_first).to(right.dtype)  # (rows, length, d_in)
        more = (h @ right.transpose(1, 2)) @ left  # (rows, length, d_out)
        more = more.transpose(0, 1) if lm.sequence_first else more
        return output + more.reshape(output.shape).to(output.dtype)

    handle = site.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _stacked(change: Factors, count: int) -> tuple[Tensor, Tensor]:
    """The factors of each edit, padded with zeros: (count, rank, d_out) and (count, rank, d_in)."""
    rows = change.rows.to(change.gradients.device)
    sizes = torch.bincount(rows, minlength=count)
    at = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]
    rank = int(sizes.max()) if len(sizes) else 0
    left = change.gradients.new_zeros(count, rank, change.gradients.shape[1])
    right = change.inputs.new_zeros(count, rank, change.inputs.shape[1])
    return left.index_put((rows, at), change.gradients), right.index_put((rows, at), change.inputs)


def _mean(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """The mean of the values of each owner, (count,)."""
    total = torch.zeros(count, device=values.device).index_add(0, owner, values.float())
    return total / torch.bincount(owner, minlength=count).clamp(min=1)


def together(groups: Sequence[Sequence[Mapping[str, Factors]]]) -> dict[str, Factors]:
    """The factors of the requests of some batches; their ``rows`` name the batch, in order.

    Args:
        groups: For each batch the factors of its requests, by weight name.
    """
    names = list(groups[0][0])
    return {name: of_rows([_one([each[name] for each in group]) for group in groups]) for name in names}


def _one(parts: Sequence[Factors]) -> Factors:
    return Factors(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat([torch.zeros_like(part.rows) for part in parts]),
    )
