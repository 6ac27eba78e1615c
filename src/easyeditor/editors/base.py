"""`BaseEditor`: validate, measure, edit, measure, record.

What comes back is what was edited. One request: the returned model carries the edit. Several requests that are not
sequential: each is applied to the pristine model, measured and taken back; the returned model is pristine, a warning
says so, and the edits are returned. Sequential: all edits stay.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.editors.arguments import Texts, requests_from_lists
from easyeditor.editors.keeping import check_places, keep, restore
from easyeditor.editors.old_calls import apply_function
from easyeditor.editors.options import Wanted, check_known, earlier_measurements, opinions_of, training_set, unknown
from easyeditor.editors.perform import checked, loaded, make_edit, prepared, put_on, spec_of
from easyeditor.editors.progress import tracked
from easyeditor.editors.records import record_of, tell, texts_only, write_json
from easyeditor.editors.taking_back import take_back
from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import EditDidNothing, EditFailed, NonFinite, UsageError
from easyeditor.hparams import HyperParams, complete
from easyeditor.lm.generate import answer
from easyeditor.lm.loading import locate
from easyeditor.lm.model import LM
from easyeditor.metrics.quality import compare_locality, quality
from easyeditor.metrics.scores import Scores
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)

Requests = Sequence[EditRequest | Mapping[str, Any]]
Records = list[dict[str, Any]]


class BaseEditor:
    """Edits a language model with one method and says what the edits are worth.

    Args:
        hparams: The settings of the method; ``model_name`` says which model.

    Attributes:
        hparams: The settings as they were given.
        model: The transformers model; loaded when it is first needed.
        tok: Its tokenizer.
        lm: Both, as an `LM`.
        model_name: Where the model comes from.
        alg_name: The method.
        apply_algo: ``apply_<method>_to_model`` of existing scripts.
        scores: What is computed besides the core scores; a `Scores`, nothing at first.
        train_ds: The training set, for methods that take demonstrations from one; what a call passes is kept here.
    """

    def __init__(self, hparams: HyperParams) -> None:
        if not isinstance(hparams, HyperParams):
            raise UsageError(
                f"BaseEditor takes settings, got a {type(hparams).__name__}. "
                "Load them first: ROMEHyperParams.from_hparams('ROME/tinyfacts')."
            )
        self.hparams = hparams
        hparams.check()
        check_places(hparams)
        self.spec = spec_of(hparams)
        self.alg_name = hparams.alg_name
        self.apply_algo = apply_function(self.spec)
        self.model_name = hparams.model_name
        if isinstance(self.model_name, str) and not getattr(hparams, "base_url", None):
            locate(self.model_name)
        self._lm: LM | None = None
        self._ready: tuple[Any, HyperParams, Mapping[str, Any]] | None = None  # settings, completed, what they need
        self._left: list[str] = []
        self.train_ds: Any = None
        self.scores = Scores()
        self._wanted = Wanted(hparams)
        self._wanted.scores(self.scores)

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        """An editor with these settings."""
        return cls(hparams)

    @property
    def lm(self) -> LM:
        """The model with its tokenizer; loaded when first asked for."""
        if self._lm is None:
            self._lm = loaded(self.hparams, self.spec)
            restore(self._lm, self.hparams)
        return self._lm

    @property
    def model(self) -> Any:
        """The transformers model, with the edits that are on it."""
        return self.lm.model

    @property
    def tok(self) -> Any:
        """The tokenizer."""
        return self.lm.tokenizer

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.lm.device

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Texts = None,
        target_neg: Texts = None,
        rephrase_prompts: Texts = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[Records, Any, list[Edit]]:
        """Edit facts one after the other and measure each.

        Args:
            prompts: One text or a list; all other lists have its length.
            target_new: The new answers.
            ground_truth: The old answers, for the probability scores.
            target_neg: Answers to move away from, for methods that use them.
            rephrase_prompts: Other wordings.
            locality_inputs: ``{name: {"prompt": list, "ground_truth": list}}``: what must not move.
            portability_inputs: Likewise: what follows from the edit.
            sequential_edit: Whether all edits stay on the model.
            verbose: Whether to log each record.
            **kwargs: ``subject`` and ``loc_prompts`` (lists), ``train_ds`` (the training set of IKE),
                ``test_generation`` (also score fluency), ``eval_metric`` (``token em``, ``ppl``, ``ood_ppl``),
                ``requests`` (built beforehand, instead of the lists), ``pre_edit`` (measurements made before),
                ``pre_file`` (where to write them), ``metric_kwargs`` (opinions, see `easyeditor.metrics.opinions`: adds
                ``es``, ``dd`` and ``fluency`` to each record), ``keep_original_weight=True`` (the same as
                ``sequential_edit=False``).

        Returns:
            One record per request (``pre``, ``post``, ``case_id``, ``requested_rewrite``, ``time``; sequential runs add
            ``final``), the model, and the edits.

        Raises:
            UsageError: An argument is wrong; nothing has been loaded or changed.
            UnknownArgument: A keyword is not one of these (a `TypeError`).
            EditFailed: An edit did nothing or did damage; it has been taken back.
        """
        check_known("edit", kwargs)
        requests = kwargs.pop("requests", None)
        lists = {name: kwargs.pop(name, None) for name in ("subject", "loc_prompts")}
        if requests is None:
            columns = (ground_truth, target_neg, rephrase_prompts, locality_inputs, portability_inputs)
            requests = requests_from_lists(prompts, target_new, *columns, **lists)
        return self.edit_requests(requests, sequential_edit, verbose, **kwargs)

    def edit_requests(
        self,
        requests: Requests,
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **kwargs: Any,
    ) -> tuple[Records, Any, list[Edit]]:
        """`edit` for requests that are already built, as `EditRequest` or as dicts.

        Args:
            requests: What to change.
            sequential_edit: Whether all edits stay on the model.
            verbose: Whether to log each record.
            test_generation: Whether to score fluency too.
            **kwargs: As in `edit`.

        Returns:
            As in `edit`.
        """
        check_known("edit_requests", kwargs)
        found = checked(requests, self.spec)
        pre = earlier_measurements(kwargs, sequential_edit, len(found))
        self._take_train(kwargs)
        edits: list[Edit] = []
        stream = self.stream(found, sequential_edit, test_generation, pre=pre, edits=edits)
        self._wanted.opinions = opinions_of(kwargs.get("metric_kwargs"), len(found))
        self._wanted.eval_metric = kwargs.get("eval_metric")
        try:
            records = list(tracked(stream, len(found), self.alg_name))
        finally:
            self._wanted.eval_metric = self._wanted.opinions = None
        if kwargs.get("pre_file"):
            write_json(Path(kwargs["pre_file"]), [{"pre": record["pre"]} for record in records])
        tell(records, edits, sequential_edit, verbose)
        return records, self.model, edits

    def stream(
        self,
        requests: Requests,
        sequential_edit: bool = False,
        test_generation: bool = False,
        *,
        batch_size: int = 1,
        pre: Sequence[Mapping[str, Any]] | None = None,
        edits: list[Edit] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The records of `edit_requests`, each as soon as it is known.

        Args:
            requests: What to change.
            sequential_edit: Whether all edits stay on the model; then the records get ``final`` when all are done.
            test_generation: Whether to score fluency too.
            batch_size: Requests per edit, for methods that take several.
            pre: Measurements made before, to be used instead of new ones.
            edits: A list that the edits are added to.

        Yields:
            Records.
        """
        found = checked(requests, self.spec)
        if self.spec.kind == "decoding":
            batch_size = len(found)  # it is put on once, whatever it is measured with
        if batch_size > 1:
            self._batchable()
        kept = edits if edits is not None else []
        yield from self._chunks(found, batch_size, sequential_edit, test_generation, pre, kept)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Texts = None,
        target_neg: Texts = None,
        rephrase_prompts: Texts = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[Records, Any, list[Edit]]:
        """Edit facts in chunks of ``batch_size``, one edit per chunk.

        Args:
            prompts: As in `edit`, like all that follow.
            target_new: The new answers.
            ground_truth: The old answers.
            target_neg: Answers to move away from.
            rephrase_prompts: Other wordings.
            locality_inputs: What must not move.
            portability_inputs: What follows from the edits.
            sequential_edit: Whether the edits of all chunks stay. A single chunk stays in any case.
            verbose: Whether to log each record.
            **kwargs: ``subject``, ``loc_prompts``, ``test_generation``, ``keep_original_weight``.

        Returns:
            As in `edit`; ``time`` is that of the chunk, and ``final`` is always there.

        Raises:
            UsageError: The method takes one request at a time, or an argument is wrong.
        """
        check_known("batch_edit", kwargs)
        self._batchable()
        lists = {name: kwargs.pop(name, None) for name in ("subject", "loc_prompts")}
        requests = checked(
            requests_from_lists(
                prompts,
                target_new,
                ground_truth,
                target_neg,
                rephrase_prompts,
                locality_inputs,
                portability_inputs,
                **lists,
            ),
            self.spec,
        )
        earlier_measurements(kwargs, sequential_edit, len(requests))
        self._take_train(kwargs)
        edits: list[Edit] = []
        size = max(self.hparams.batch_size, 1)
        stream = self._chunks(requests, size, sequential_edit, kwargs.get("test_generation", False), None, edits, True)
        records = list(tracked(stream, len(requests), self.alg_name))
        tell(records, edits, sequential_edit, verbose)
        return records, self.model, edits

    def normal_edit(
        self, prompts: Sequence[str], target_new: Sequence[str], sequential_edit: bool = False, **kwargs: Any
    ) -> tuple[None, Any, list[Edit]]:
        """Edit all facts with one edit and measure nothing; the returned model carries it.

        Args:
            prompts: The prompts.
            target_new: The new answers.
            sequential_edit: Whether what earlier calls left on the model stays.
            **kwargs: ``subject``, a list, for methods that need it.

        Returns:
            None, the model, and the edit in a list.
        """
        if extra := set(kwargs) - {"subject"}:
            raise unknown("normal_edit", sorted(extra)[0], ("subject",))
        self._batchable()
        requests = checked(requests_from_lists(prompts, target_new, subject=kwargs.get("subject")), self.spec)
        self._begin(sequential_edit)
        edit = self._make(requests)
        edit_id = put_on(self.lm, edit, requests)
        self._left = [] if sequential_edit else [edit_id]
        return None, self.model, [edit]

    def generate_edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Texts = None,
        target_neg: Texts = None,
        rephrase_prompts: Texts = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[Records, Any, list[Edit]]:
        """`edit` with the generated texts in place of scores, through the chat template if ``use_chat_template`` is on.

        Args:
            prompts: As in `edit`, like all that follow.
            target_new: The new answers.
            ground_truth: The old answers.
            target_neg: Answers to move away from.
            rephrase_prompts: Other wordings.
            locality_inputs: What must not move.
            portability_inputs: What follows from the edits.
            sequential_edit: Whether all edits stay on the model.
            verbose: Whether to log each record.
            **kwargs: ``subject``, ``loc_prompts``.

        Returns:
            Records with ``rewrite_ans``, ``rephrase_ans``, ``locality_ans`` and ``portability_ans`` in ``pre`` and
            ``post``, and ``fluency`` in ``post``; the model; the edits.
        """
        check_known("generate_edit", kwargs)
        lists = {name: kwargs.pop(name, None) for name in ("subject", "loc_prompts")}
        requests = requests_from_lists(
            prompts,
            target_new,
            ground_truth,
            target_neg,
            rephrase_prompts,
            locality_inputs,
            portability_inputs,
            **lists,
        )
        records, model, edits = self.edit_requests(requests, sequential_edit, False, test_generation=True, **kwargs)
        for record in records:
            for phase in ("pre", "post"):
                record[phase] = texts_only(record[phase], phase)
        tell(records, (), sequential_edit, verbose)
        return records, model, edits

    def deep_edit(self, datasets: Any) -> Records:
        """Answer questions in hops over a memory of edited facts; for MeLLo and DeepEdit-Api.

        Args:
            datasets: Cases as MQuAKE has them, or an `MQuAKEDataset`.

        Returns:
            One record per case; see `easyeditor.methods.mello.answered`.

        Raises:
            UsageError: The method makes edits, or a case has no facts or questions.
        """
        if self.spec.kind != "answering":
            raise UsageError(
                f"{self.spec.name} makes edits and answers no questions in hops. Call edit(...); for answers over a "
                "memory of facts take the settings of MeLLo or DeepEdit-Api."
            )
        here = None if getattr(self.hparams, "base_url", None) else self.lm
        records: Records = self.spec.run(datasets, self.hparams, here)
        return records

    def rollback(self, key: str | Edit | EditRequest) -> list[Edit]:
        """Take edits or single facts back, whatever came after them.

        A fact that was changed together with others is taken out of their edit, which is then what it would have been
        without that fact; all its other facts stay.

        Args:
            key: The id of an edit, the edit, or what names facts: the ``target_new``, the prompt, the request, or
                ``prompt -> target_new``.

        Returns:
            The edits that were taken back, as they were.

        Raises:
            UsageError: No edit on the model has this id or fact, or its method cannot take one fact out.
        """
        taken, standing = take_back(self.lm, key)
        self._left = [new for old in self._left if (new := standing.get(old, old)) is not None]
        return taken

    def apply(self, requests: Requests) -> list[Edit]:
        """Edit facts and measure nothing; all edits stay on the model.

        Args:
            requests: What to change.

        Returns:
            One edit per request, or a single one from a method that takes several requests.
        """
        found = checked(requests, self.spec)
        parts = [found] if self.spec.requests == "many" else [[request] for request in found]
        edits = []
        for part in tracked(parts, len(parts), self.alg_name):
            edit = self._make(part)
            put_on(self.lm, edit, part)
            edits.append(edit)
        keep(self.lm, self.hparams)
        return edits

    def ask(self, prompts: str | Sequence[str]) -> list[str]:
        """What the model answers now, freely and greedily, with the edits that are on it."""
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        return answer(self.lm, listed, self.hparams.max_new_tokens)

    def _batchable(self) -> None:
        if self.spec.requests != "many":
            raise UsageError(
                f"{self.spec.name} makes one edit per request. Use edit(..., sequential_edit=True) instead."
            )

    def _begin(self, sequential: bool) -> None:
        """A call that is not sequential starts from what an earlier such call found."""
        ledger = Ledger.of(self.lm)
        there = {edit.id for edit in ledger.active}  # some may have been taken back by hand
        for edit_id in self._left if not sequential else ():
            if edit_id in there:
                ledger.undo(edit_id)
        self._left = []

    def _take_train(self, kwargs: Mapping[str, Any]) -> None:
        given = training_set(kwargs, self.spec)
        self.train_ds = self.train_ds if given is None else given

    def _prepare(self) -> tuple[HyperParams, Mapping[str, Any]]:
        """Complete settings, and what the method needs once per model and training set."""
        asked = copy.deepcopy((self.hparams.to_dict(), self.hparams.given)), self.train_ds
        if self._ready is None or self._ready[0][0] != asked[0] or self._ready[0][1] is not asked[1]:
            full = complete(self.hparams, self.lm)
            self._ready = (asked, full, prepared(self.lm, self.spec, full, self.train_ds))
        return self._ready[1:]

    def _make(self, requests: Sequence[EditRequest]) -> Edit:
        return make_edit(self.lm, self.spec, requests, *self._prepare())

    def _measure(self, requests: Sequence[EditRequest], test_generation: bool = False) -> Records:
        hp = self.hparams
        return quality(
            self.lm,
            requests,
            max_new_tokens=hp.max_new_tokens,
            test_generation=test_generation,
            seed=hp.seed,
            scores=self._wanted.scores(self.scores),
        )

    def _chunks(
        self,
        requests: list[EditRequest],
        size: int,
        sequential: bool,
        test_generation: bool,
        pre: Sequence[Mapping[str, Any]] | None,
        edits: list[Edit],
        final: bool = False,
    ) -> Iterator[dict[str, Any]]:
        self._begin(sequential)
        if self.spec.demonstrations:
            self._prepare()  # a training set that is missing is told before anything is measured
        before = [dict(scores) for scores in pre] if pre else self._measure(requests, test_generation)
        chunks = [range(i, min(i + size, len(requests))) for i in range(0, len(requests), size)]
        records: Records = []
        for chunk in chunks:
            part = [requests[i] for i in chunk]
            start = time.perf_counter()
            outcome = self._attempt(part, alone=len(chunks) == 1)
            seconds = time.perf_counter() - start
            if isinstance(outcome, Edit):
                edits.append(outcome)
            try:
                after = self._measure(part, test_generation)
                for i, scores in zip(chunk, after, strict=True):
                    compare_locality(self.lm, before[i], scores)
                    record = record_of(i, requests[i], before[i], scores, seconds, outcome)
                    records.append(record | self._wanted.turned(self.lm, i))
            finally:
                if isinstance(outcome, Edit) and not sequential:
                    if len(chunks) > 1:
                        Ledger.of(self.lm).undo(outcome.id)
                    else:
                        self._left.append(outcome.id)
            yield from records[chunk.start : chunk.stop]
        keep(self.lm, self.hparams)
        if sequential or final:
            self._finish(requests, before, records, test_generation)

    def _attempt(self, requests: Sequence[EditRequest], alone: bool) -> Edit | EditFailed:
        """Make an edit and put it on. In a run of several, one that fails is recorded and the run goes on."""
        try:
            edit = self._make(requests)
            put_on(self.lm, edit, requests)
            return edit
        except (EditDidNothing, NonFinite) as error:
            if alone:
                raise
            log.warning("%s", error)
            return error

    def _finish(self, requests: list[EditRequest], before: Records, records: Records, test_generation: bool) -> None:
        """Measure all requests on the model that is returned."""
        for i, scores in enumerate(self._measure(requests, test_generation)):
            compare_locality(self.lm, before[i], scores)
            records[i]["final"] = scores
