"""Data sets: every layout becomes requests, bad records are named, and the fact table gives sound edits."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from easyeditor.data import CounterFactDataset, TinyFacts, ZsreDataset, load_requests, read_rows
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest, Probe

FIXTURES = Path(__file__).parent / "fixtures"
Write = Callable[[str, Any], Path]


def refused(path: Path, *parts: str) -> str:
    """Reading the file is refused; the message contains all parts."""
    with pytest.raises(UsageError) as caught:
        load_requests(path)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


# Layouts


def test_counterfact_original() -> None:
    first, second = load_requests(FIXTURES / "counterfact.json")
    assert first.prompt == "Port Marlow is set beside the river"
    assert (first.subject, first.target_new, first.ground_truth, first.case_id) == ("Port Marlow", "Elbe", "Danube", 7)
    assert len(first.rephrase_prompts) == 2
    neighbours = ("Old Quay is set beside the river", "Tern Landing is set beside the river")
    assert first.locality["neighborhood"] == tuple(Probe(text, ("Danube",)) for text in neighbours)
    assert first.locality["distracting"][0].answers == ("Danube",)
    assert first.locality["other_attribute"] == (Probe("What is Port Marlow an instance of?", ("town",)),)
    assert first.portability["one_hop"][0].answers == ("North Sea",)
    assert second.portability["subject_replace"] == (Probe("The painter A. M. Verlinde worked in", ("Lisbon",)),)
    assert second.locality == {}


def test_counterfact_dataset_original() -> None:
    data = CounterFactDataset(FIXTURES / "counterfact.json", config="kept")
    assert data.config == "kept" and len(data) == 2
    assert data[0] == {
        "case_id": 7,
        "prompt": "Port Marlow is set beside the river",
        "target_new": "Elbe",
        "ground_truth": "Danube",
        "subject": "Port Marlow",
        "rephrase_prompt": "Rain fell. Port Marlow stands beside the",
        "locality_prompt": "Old Quay is set beside the river",
        "locality_ground_truth": "Danube",
        "paraphrase_prompts": ["Rain fell. Port Marlow stands beside the", "The river at Port Marlow is the"],
        "neighborhood_prompts": ["Old Quay is set beside the river", "Tern Landing is set beside the river"],
    }
    assert data[1]["locality_prompt"] is None and data[1]["locality_ground_truth"] is None
    assert data.requests() == load_requests(FIXTURES / "counterfact.json")
    assert [item["case_id"] for item in data] == [7, 9]


def test_counterfact_dataset_flat_passes_its_dicts_on() -> None:
    path = FIXTURES / "counterfact_flat.json"
    data = CounterFactDataset(str(path), size=1)
    assert len(data) == 1 and data[0] == json.loads(path.read_text())[0]
    request = data.requests()[0]
    assert request.locality["neighborhood"] == (Probe("The mother tongue of Jan Coppens is", ("Dutch",)),)
    assert request.rephrase_prompts == ("At home Ada Verlinde spoke",)


def test_zsre(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        first, second = load_requests(FIXTURES / "zsre.json")
    assert "1 of 3 records were left out" in caplog.text and "1 records spell their subject otherwise" in caplog.text
    assert (first.prompt, first.target_new, first.ground_truth) == (
        "Which river does Marlow Creek feed?",
        "Tagus",
        "Danube",
    )
    assert first.locality["unrelated"] == (Probe("nq question: how many legs does a spider have", ("eight",)),)
    assert first.portability["one_hop"][0].answers == ("Lisbon",)
    assert second.subject is None, "the prompt spells it otherwise"
    assert second.portability["inverse_relation"][0].answers == ("Queen Ada of Marlow",)
    assert second.portability["subject_replace"] == (Probe("Who was Ada II's sister?", ("Iris of Ghent",)),)


def test_zsre_dataset() -> None:
    data = ZsreDataset(FIXTURES / "zsre.json")
    assert [item["case_id"] for item in data] == [0, 2], "the place in the file"
    assert data[0] == {
        "case_id": 0,
        "prompt": "Which river does Marlow Creek feed?",
        "target_new": "Tagus",
        "ground_truth": "Danube",
        "rephrase_prompt": "What river is Marlow Creek part of?",
        "locality_prompt": "nq question: how many legs does a spider have",
        "locality_ground_truth": "eight",
        "cond": "Danube >> Tagus || Which river does Marlow Creek feed?",
        "subject": "Marlow Creek",
    }
    assert data[1]["locality_prompt"] is None


def test_size_counts_usable_records() -> None:
    assert len(ZsreDataset(FIXTURES / "zsre.json", size=2)) == 2


def test_knowedit() -> None:
    first, second = load_requests(FIXTURES / "knowedit.json")
    probes = first.locality["Relation_Specificity"]
    assert [probe.answers for probe in probes] == [("Ghent", "Gent"), ("painter", "teacher")]
    assert first.ground_truth is None and first.portability == {}
    assert (second.subject, second.ground_truth, second.rephrase_prompts) == (
        None,
        "Ghent Works",
        ("Who made R&G 463?",),
    )
    assert second.portability["Reasoning"] == (Probe("Where is the maker of R&G 463?", ("Port Marlow",)),)


def test_wikibio_and_qaedit() -> None:
    biography = load_requests(FIXTURES / "wikibio.json")[0]
    assert biography.subject == "ada verlinde" and biography.target_new.startswith("She taught")
    question = load_requests(FIXTURES / "qaedit.json")[0]
    assert (question.case_id, question.target_new, question.subject) == (1104, "Jan Coppens", "old quay")
    assert [probe.answers for probe in question.locality["unrelated"]] == [("William Shakespeare",), ("eight",)]


def test_own_csv() -> None:
    first, second = load_requests(FIXTURES / "own.csv")
    assert first == EditRequest(
        prompt="The capital of Marlovia is",
        target_new="Ghentown",
        subject="Marlovia",
        ground_truth="Port Marlow",
        rephrase_prompts=("Marlovia's capital is called", "Marlovia is governed from"),
        locality={
            "neighborhood": (Probe("The capital of France is", ("Paris",)), Probe("The capital of Italy is", ("Rome",)))
        },
        portability={"one_hop": (Probe("The river in the capital of Marlovia is", ("Elbe",)),)},
        case_id=12,
    )
    assert second == EditRequest(prompt="Old Quay, which was built by", target_new="Ada Verlinde")


def test_own_json_lines() -> None:
    first, second = load_requests(FIXTURES / "own.jsonl")
    assert first.target_new == "Ghentown" and len(first.rephrase_prompts) == 2
    assert (second.subject, second.target_neg, second.loc_prompt) == (None, "Jan Coppens", "The weather is")


def test_own_nested() -> None:
    request = load_requests(FIXTURES / "own_nested.json")[0]
    assert [probe.prompt for probe in request.locality["neighborhood"]] == [
        "The capital of France is",
        "The capital of Italy is",
    ]
    assert list(request.locality) == ["neighborhood"], "a group without prompts is no group"
    assert request.portability["one_hop"][0].answers == ("Elbe",)


def test_nested_and_flat_probes_join(write: Write) -> None:
    row = {"prompt": "A is", "target_new": "b", "locality": {"x": {"prompt": "C is", "ground_truth": "d"}}}
    request = load_requests(write("a.json", [{**row, "locality_prompt": "E is"}]))[0]
    assert request.locality == {"x": (Probe("C is", ("d",)),), "neighborhood": (Probe("E is"),)}


def test_one_locality_prompt_may_have_several_answers(write: Write) -> None:
    path = write("a.csv", "prompt,target_new,locality_prompt,locality_ground_truth\nA is,b,C is,d|e\n")
    assert load_requests(path)[0].locality["neighborhood"] == (Probe("C is", ("d", "e")),)


def test_limit_keeps_the_first_and_checks_the_rest(write: Write) -> None:
    good, bad = {"prompt": "A is", "target_new": "b"}, {"prompt": "A is", "target_new": ""}
    assert len(load_requests(write("good.json", [good] * 3), limit=2)) == 2
    path = write("bad.json", [good, good, bad])
    with pytest.raises(UsageError, match="record 3, field 'target_new'"):
        load_requests(path, limit=1)
    with pytest.raises(UsageError, match="limit of -1"):
        load_requests(write("good.json", [good]), limit=-1)


def test_records_carry_their_place() -> None:
    assert load_requests(FIXTURES / "own.csv")[1].record == "own.csv, record 2"


# Files


def test_bom_semicolons_and_spaces(write: Write) -> None:
    path = write("excel.csv", "\ufeffprompt; target_new;subject\r\nThe capital of A is; b ;A\r\n")
    assert load_requests(path) == [EditRequest(prompt="The capital of A is", target_new="b", subject="A")]
    assert read_rows(write("bom.json", "\ufeff[{}]")) == [{}]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.json", "", ["is empty"]),
        ("empty.csv", "\n \n", ["is empty"]),
        ("header.csv", "prompt,target_new\n", ["holds no records"]),
        ("none.json", "[]", ["holds no records"]),
        ("broken.json", '[{"prompt": "a"},\n {"prompt": }]', ["line 2, column 13", "not valid JSON"]),
        ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}', ["line 2", "name it .jsonl"]),
        ("broken.jsonl", '{"prompt": "a", "target_new": "b"}\n\n{"prompt": "a"\n', ["line 3", "one complete record"]),
        ("one.json", '{"prompt": "a", "target_new": "b"}', ["'prompt', 'target_new'", "put a single record into [ ]"]),
        ("two.json", '{"first": [], "second": []}', ["'first', 'second'", "list of records"]),
        ("number.json", "3", ["holds a number"]),
        ("mixed.json", '[{"prompt": "a", "target_new": "b"}, "c"]', ["record 2", "it is a text"]),
        ("records.txt", "prompt", ["ends in '.txt'", ".jsonl"]),
        ("twice.csv", "prompt,prompt\na,b\n", ["column 'prompt' is there twice"]),
        ("wide.csv", "prompt,target_new\nOld Quay, by,b\n", ["record 1", "more cells"]),
        ("quote.csv", 'prompt,target_new\n"a,b\n', ["not valid CSV"]),
        ("other.json", '[{"ent": "a", "pos": []}]', ["'ent', 'pos'", "'prompt' and 'target_new'"]),
    ],
)
def test_bad_files(write: Write, name: str, content: str, parts: list[str]) -> None:
    refused(write(name, content), *parts)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "gone.json", "There is no file", "gone.json")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", "is a folder")


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,target_new\nZürich is,b\n".encode("latin-1"))
    refused(path, "not UTF-8", "Save it as UTF-8")


# Records


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "A is", "target_new": ""}, ["field 'target_new'", "is empty"]),
        ({"prompt": "A is", "target_new": 1998}, ["field 'target_new'", "expected a text, got 1998"]),
        ({"prompt": "A is"}, ["field 'target_new'", "is missing"]),
        ({"target_new": "b"}, ["field 'prompt'", "is missing"]),
        (
            {"prompt": "A is", "target_new": "b", "subject": "C"},
            ["field 'subject'", "'C' does not occur in the prompt"],
        ),
        ({"prompt": "A is", "target_new": "b", "subjekt": "A"}, ["unknown field 'subjekt'", "Did you mean 'subject'?"]),
        ({"promt": "A is", "target_new": "b"}, ["unknown field 'promt'", "Did you mean 'prompt'?"]),
        ({"prompt": "A is", "target": "b", "target_new": "c"}, ["'target' and 'target_new'", "Keep one"]),
        ({"prompt": "A is", "target_new": "b", "rephrase_prompt": 5}, ["field 'rephrase_prompt'", "list of texts"]),
        ({"prompt": "A is", "target_new": "b", "case_id": "x"}, ["field 'case_id'", "number"]),
        ({"prompt": "A is", "target_new": "b", "loc_prompt": ["x"]}, ["field 'loc_prompt'", "expected a text"]),
        (
            {"prompt": "A is", "target_new": "b", "locality_prompt": ["C", "D"], "locality_ground_truth": ["e"]},
            ["locality.neighborhood", "2 prompts but 1 answers"],
        ),
        ({"prompt": "A is", "target_new": "b", "locality_ground_truth": "e"}, ["there is no 'locality_prompt'"]),
        ({"prompt": "A is", "target_new": "b", "portability_prompt": "C"}, ["'portability_ground_truth'", "missing"]),
        ({"prompt": "A is", "target_new": "b", "locality": {"x": {"prompt": 5}}}, ["locality.x", "got 5"]),
        ({"prompt": "A is", "target_new": "b", "portability": {"x": {"question": "C"}}}, ["portability.x", "'prompt'"]),
        ({"prompt": "A is", "target_new": "b", "locality": ["C"]}, ["field 'locality'", "list"]),
        (
            {"prompt": "A", "target_new": "b", "locality": {"neighborhood": {"prompt": "C"}}, "locality_prompt": "D"},
            ["both given"],
        ),
    ],
)
def test_bad_records(write: Write, row: dict[str, Any], parts: list[str]) -> None:
    refused(write("mine.json", [row]), "mine.json, record 1", *parts)


def test_unequal_lists_in_csv(write: Write) -> None:
    path = write("a.csv", "prompt,target_new,locality_prompt,locality_ground_truth\nA is,b,C is|D is,d|e|f\n")
    refused(path, "a.csv, record 1", "2 prompts but 3 answers")


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("counterfact.json", {"requested_rewrite": {"prompt": "A is"}}, ["requested_rewrite.subject", "is missing"]),
        ("counterfact.json", {"paraphrase_prompts": 3}, ["field 'paraphrase_prompts'"]),
        ("counterfact.json", {"portability": {"New Question": "q"}}, ["portability.New Answer"]),
        ("counterfact.json", {"neighbourhood_prompts": []}, ["Did you mean 'neighborhood_prompts'?", "CounterFact"]),
        ("zsre.json", {"alt": 5}, ["field 'alt'", "expected a text"]),
        ("zsre.json", {"src": None}, ["field 'src'", "is missing"]),
        ("zsre.json", {"loc_ans": None}, ["field 'loc_ans'"]),
        ("knowedit.json", {"locality": {"Relation_Specificity": ["text"]}}, ["locality.Relation_Specificity"]),
        ("knowedit.json", {"target_new": None}, ["field 'target_new'", "is missing"]),
        ("qaedit.json", {"locality": [{"loc": "q"}]}, ["locality.loc_ans"]),
    ],
)
def test_bad_published_records(write: Write, name: str, change: dict[str, Any], parts: list[str]) -> None:
    rows = json.loads((FIXTURES / name).read_text(encoding="utf-8"))
    refused(write(name, [rows[0] | change, *rows[1:]]), "record 1", *parts)


def test_template_without_a_place_for_the_subject(write: Write) -> None:
    rows = json.loads((FIXTURES / "counterfact.json").read_text(encoding="utf-8"))
    rows[1]["requested_rewrite"]["prompt"] = "Ada worked in"
    refused(write("cf.json", rows), "cf.json, record 2", "no '{}'")


def test_first_bad_records_are_named_together(write: Write) -> None:
    rows = [{"prompt": "A is", "target_new": "b"}] + [{"prompt": f"A{n} is", "target_new": " "} for n in range(8)]
    message = refused(write("many.json", rows), "8 of 9 records", "record 2,", "record 6,", "and 3 more")
    assert "record 7" not in message


def test_unknown_fields_are_named_once(write: Write) -> None:
    rows = [{"prompt": "A is", "target_new": "b", "note": "x", "page": 1}] * 3
    message = refused(write("many.json", rows), "unknown field 'note'", "Also unknown: 'page' (record 1).")
    assert message.count("Known:") == 1


# The fact table


@pytest.fixture
def table(tmp_path: Path) -> TinyFacts:
    relations = {
        "capital": {"trained": ["The capital of {} is", "What is the capital of {}?"], "held_out": ["{} is led from"]},
        "river": {"trained": ["The river of {} is"], "held_out": ["Through {} flows the"]},
        "only": {"trained": ["{} is made of"], "held_out": []},
    }
    facts = []
    for number, (land, city, river, half) in enumerate(
        [
            ("Aland", "Ado", "Aar", "tuning"),
            ("Bland", "Bedo", "Aar", "tuning"),
            ("Cland", "Cido", "Cam", "tuning"),
            ("Dland", "Dodo", "Dee", "reporting"),
            ("Eland", "U.S.", "Ems", "reporting"),
        ]
    ):
        facts.append({"id": f"c{number}", "subject": land, "relation": "capital", "answer": city, "half": half})
        facts.append({"id": f"r{number}", "subject": land, "relation": "river", "answer": river, "half": half})
    facts[0]["aliases"] = ["Bedo", "Old Ado"]
    facts[0]["prompts"] = ["Aland is run from"]
    facts.append({"id": "m0", "subject": "Moon", "relation": "only", "answer": "stone", "half": "tuning"})
    (tmp_path / "relations.json").write_text(json.dumps(relations), encoding="utf-8")
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(fact) for fact in facts), encoding="utf-8")
    return TinyFacts(folder=tmp_path)


def check_edits(table: TinyFacts, requests: list[EditRequest]) -> None:
    """Every request asks for a wrong answer of the right kind, and every probe for a fact of the table."""
    known = {(prompt, fact.answers): fact for fact in table.facts for prompt in table._prompts(fact)}
    by_prompt = {prompt: fact for (prompt, _), fact in known.items()}
    for request in requests:
        fact = by_prompt[request.prompt]
        assert (request.subject, request.ground_truth) == (fact.subject, fact.answer)
        assert request.target_new.casefold() not in {answer.casefold() for answer in fact.answers}
        peers = [other for other in table.facts if other.relation == fact.relation]
        assert request.target_new in {peer.answer for peer in peers}
        assert len(request.rephrase_prompts) == len(table.relations[fact.relation].held_out)
        for probe in request.locality.get("neighborhood", ()):
            neighbour = known[probe.prompt, probe.answers]
            assert neighbour.relation == fact.relation and neighbour.subject != fact.subject
            assert neighbour.half == fact.half
        for probe in request.locality.get("same_subject", ()):
            other = known[probe.prompt, probe.answers]
            assert other.subject == fact.subject and other.relation != fact.relation


def test_tinyfacts_requests(table: TinyFacts) -> None:
    requests = table.requests(per_subject=None)
    assert len(requests) == 10, "a fact whose relation has one answer cannot be edited"
    check_edits(table, requests)
    first = next(request for request in requests if request.prompt == "The capital of Aland is")
    assert first.target_new not in ("Ado", "Bedo"), "not an alias"
    assert first.rephrase_prompts == ("Aland is led from",)


def test_tinyfacts_one_request_per_subject(table: TinyFacts) -> None:
    requests = table.requests()
    assert sorted(request.subject or "" for request in requests) == ["Aland", "Bland", "Cland", "Dland", "Eland"]
    assert {request.subject for request in table.requests("reporting")} == {"Dland", "Eland"}


def test_tinyfacts_is_drawn_by_its_seed(table: TinyFacts) -> None:
    assert table.requests(seed=3) == table.requests(seed=3)
    assert any(table.requests(seed=0) != table.requests(seed=seed) for seed in (1, 2, 3))
    assert table.requests(limit=2, seed=3) == table.requests(seed=3)[:2]
    assert table.requests("tuning", seed=3) == [
        r for r in table.requests(seed=3) if r in table.requests("tuning", seed=3)
    ]


def test_tinyfacts_neighbours_rather_have_another_answer_than_the_new_one(table: TinyFacts) -> None:
    for request in table.requests("tuning", per_subject=None):
        answers = [probe.answers[0] for probe in request.locality["neighborhood"]]
        assert request.target_new not in answers[:1]


def test_tinyfacts_sentences(table: TinyFacts) -> None:
    sentences = table.sentences()
    assert sentences[:3] == [
        "The capital of Aland is Ado.",
        "What is the capital of Aland? Ado.",
        "Aland is run from Ado.",
    ]
    assert "The capital of Eland is U.S." in sentences
    assert not any("led from" in sentence for sentence in sentences), "held-out wordings stay out of the corpus"


def test_tinyfacts_bad_tables(table: TinyFacts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no half 'tunning'\. Did you mean 'tuning'"):
        table.requests("tunning")
    facts = tmp_path / "facts.jsonl"
    for line, part in (('{"id": "x"', "not valid JSON"), ('{"id": "x"}', "'subject' is missing"), ("[]", "an object")):
        facts.write_text(line, encoding="utf-8")
        with pytest.raises(UsageError, match=f"line 1: .*{part}"):
            TinyFacts(tmp_path)
    facts.unlink()
    with pytest.raises(UsageError, match=r"facts\.jsonl"):
        TinyFacts(tmp_path)


def test_bundled_table_gives_edits_of_both_halves() -> None:
    table = TinyFacts()
    for half in ("tuning", "reporting"):
        requests = table.requests(half, limit=100)
        assert len({request.subject for request in requests}) == 100
        assert all(request.rephrase_prompts and request.locality["neighborhood"] for request in requests)
        check_edits(table, requests)
    assert not {r.subject for r in table.requests("tuning")} & {r.subject for r in table.requests("reporting")}


# Published files, where they are at hand

DATA = os.environ.get("EASYEDITOR_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="set EASYEDITOR_DATA to a folder of published data sets")
PUBLISHED = [
    *(
        f"counterfact/counterfact{end}.json"
        for end in ("", "_portability_gpt4", "_distracting_neighbor", "_subject_replace", "-edit", "-train", "-val")
    ),
    *(
        f"zsre/zsre_{name}.json"
        for name in ("eval_2k", "mend_train_1k", "mend_eval_portability_gpt4", "inverse_relation", "subject_replace")
    ),
    *(f"knowedit/wiki_{name}.json" for name in ("recent_train", "counterfact_train_cf", "counterfact_test_cf")),
    *(f"knowedit/{name}.json" for name in ("ZsRE-test-all", "wikibio-test-all", "wikibio-train-all")),
    "wikibigedit/wikibigedit_1k.json",
    "qaedit/QAEdit_inter_1k.json",
]


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_record_converts(name: str) -> None:
    path = Path(DATA) / name
    rows = read_rows(path)
    requests = load_requests(path)
    assert len(requests) == sum(bool(str(row.get("alt", "x")).strip()) for row in rows)
    for request in requests:
        assert all(probe.prompt for group in request.portability.values() for probe in group)


@needs_data
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CounterFactDataset, "counterfact/counterfact.json"),
        (CounterFactDataset, "counterfact/counterfact-val.json"),
        (ZsreDataset, "zsre/zsre_mend_train_1k.json"),
    ],
)
def test_published_files_as_datasets(kind: type[CounterFactDataset] | type[ZsreDataset], name: str) -> None:
    data = kind(Path(DATA) / name, size=50)
    assert len(data) == len(data.requests()) == 50
    fields = ("case_id", "prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "subject")
    assert all(item[field] not in (None, "") for item in data for field in fields)
    assert [item["prompt"] for item in data] == [request.prompt for request in data.requests()]


@needs_data
@pytest.mark.parametrize(
    "name",
    [
        "counterfact/known_1000.json",
        "dune/new_info.json",
        "mmedit/caption_eval_edit.json",
        "safety/detoxify_val_mild.json",
        "pitfalls/GPT-J/round_prompts.json",
    ],
)
def test_published_files_that_hold_no_edits_are_refused(name: str) -> None:
    refused(Path(DATA) / name, Path(name).name)
