"""The published data sets: every layout is told by its fields, and gives edits with the probes it promises."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import easyeditor
from easyeditor.bench.plan import pool_of
from easyeditor.cli import application
from easyeditor.cli.facts import many_facts
from easyeditor.data import DATA_SETS, data_set, load_requests
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.files import load
from easyeditor.errors import MissingExtra, UsageError
from easyeditor.requests import EditRequest, Probe

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {
    "akew.json": "akew",
    "cknowedit.json": "cknowedit",
    "conceptedit.json": "conceptedit",
    "conflictedit.json": "conflictedit",
    "convsent.json": "convsent",
    "counterfact.json": "counterfact",
    "counterfact_flat.json": "own",
    "halluedit.csv": "halluedit",
    "knowedit.json": "knowedit",
    "leme.json": "leme",
    "mquake.json": "mquake",
    "multitask.json": "multitask",
    "own.csv": "own",
    "own.jsonl": "own",
    "own_nested.json": "own",
    "personality.json": "personality",
    "qaedit.json": "qaedit",
    "relations.json": "lre",
    "roundedit.json": "roundedit",
    "safeedit.json": "safeedit",
    "sanitation.json": "sanitation",
    "sanitation_test.json": "sanitation",
    "ultraedit.json": "wikibigedit",
    "unke.json": "unke",
    "wikibigedit.json": "wikibigedit",
    "wikibio.json": "knowedit",
    "zsre.json": "zsre",
}
Write = Callable[[str, Any], Path]


def reader(name: str) -> type[RecordDataset]:
    found = data_set(name).reader
    assert found is not None
    kind: type[RecordDataset] = getattr(easyeditor, found)
    return kind


def check(path: Path, expected: str) -> list[EditRequest]:
    """The file is read as expected; its groups are among those the data set promises; its class gives the same."""
    loaded = load(path)
    requests = [edit.request for edit in loaded.edits]
    assert loaded.data_set.name == expected and requests == load_requests(path)
    locality, portability = ({*names} for names in loaded.data_set.groups)
    for request in requests:
        assert EditRequest.from_dict(request.to_dict()).prompt == request.prompt
        if loaded.data_set.reader:
            assert set(request.locality) <= locality and set(request.portability) <= portability
    if loaded.data_set.reader:
        data = reader(expected)(path)
        assert data.requests() == requests and len(data) > 0
        json.dumps(list(data))
    return requests


def test_every_fixture_is_told_by_its_fields() -> None:
    names = {path.name for path in FIXTURES.iterdir()}
    assert names == set(FILES)
    read = {expected for name, expected in FILES.items() if check(FIXTURES / name, expected)}
    assert read == {each.name for each in DATA_SETS} - {"akew-unstructured"}


# What each layout gives


def test_wikibigedit() -> None:
    first, second = load_requests(FIXTURES / "wikibigedit.json")
    assert (first.subject, first.target_new) == ("Old Quay", "Iris Coppens")
    assert first.portability["personas"][0].answers == ("Iris Coppens",)
    assert first.portability["multi_hop"] == (Probe("Where was the harbour master of Old Quay born?", ("Ghentown",)),)
    assert list(second.portability) == ["personas"], "a question that is null is none"
    item = easyeditor.WikiBigEditDataset(FIXTURES / "wikibigedit.json")[1]
    assert (item["portability_hop"], item["locality_ans"], item["case_id"]) == (None, "Danube", 1)
    ultra = load_requests(FIXTURES / "ultraedit.json")[0]
    assert (ultra.target_new, ultra.case_id, len(ultra.rephrase_prompts)) == ("teal", 3, 1)


def test_mquake_one_request_per_edit_and_the_chain_with_the_last() -> None:
    alone, first, last = load_requests(FIXTURES / "mquake.json")
    assert (first.case_id, last.case_id) == (22, 22) and first.record.endswith("record 2, edit 1")
    assert alone.portability["multi_hop"][1].answers == ("Iris Coppens", "I. Coppens")
    assert alone.locality["neighbour_hops"] == (Probe("Who leads Marlovia?", ("Iris Coppens", "I. Coppens")),)
    assert first.portability == {}
    assert list(last.portability) == ["multi_hop_of_all_edits"], "it follows from both edits, not from one"
    data = easyeditor.MQuAKEDataset(FIXTURES / "mquake.json", size=2)
    assert len(data) == 2 and len(data.requests()) == 3
    assert data[1]["prompt"] == ["Jan Peeters plays", "chess was invented in"]
    assert data[1]["portability_ground_truth"] == "Aland"
    assert len(load_requests(FIXTURES / "mquake.json", limit=2)) == 2


def test_akew_as_facts_and_as_paragraphs(tmp_path: Path) -> None:
    fact, update = load_requests(FIXTURES / "akew.json")
    assert (fact.prompt, fact.target_new, fact.ground_truth) == ("Old Quay was built in", "Marlovia", "Aland")
    assert update.locality["unrelated"] == (Probe("Who keeps the lighthouse?", ("Ada II",)),)
    text = load_requests(FIXTURES / "akew.json", layout="akew-unstructured")[0]
    assert text.prompt == "Where was Old Quay built?" and text.target_new.startswith("Old Quay stands on the coast")
    assert text.portability["sub_question"] == (Probe("Marlovia lies by the", ("sea",)),)
    (tmp_path / "AKEW").mkdir()
    (tmp_path / "AKEW" / "CounterFact.json").write_bytes((FIXTURES / "akew.json").read_bytes())
    data = easyeditor.AKEWUnifiedDataset(tmp_path, "counterfact")
    assert data[0]["rephrase"] == "Where was Old Quay built?" and data[1]["locality_ans"] == "Ada II"
    data = easyeditor.AKEWUnifiedDataset(tmp_path, "counterfact", use_unstructured_data=True)
    assert (data[0]["sub_question"], data[0]["sub_answer"]) == (["Marlovia lies by the"], ["sea"])
    with pytest.raises(UsageError, match="Did you mean 'mquake'"):
        easyeditor.AKEWUnifiedDataset(tmp_path, "mquak")
    chains = easyeditor.AKEWUnifiedDataset(FIXTURES / "mquake.json", "MQuAKE-CF")
    assert chains[0]["portability_ground_truth"] == ["Iris Coppens"] * 2
    assert easyeditor.AKEWUnifiedDataset(FIXTURES / "unke.json", "unke")[0]["sub_answer"][1] == "Nine years."


def test_unke() -> None:
    long, plain = load_requests(FIXTURES / "unke.json")
    assert long.portability["sub_question"][1] == Probe("For how long?", ("Nine years.",))
    assert plain.portability == {} and plain.rephrase_prompts == ("Why is Hallow Bridge known?",)


def test_halluedit_from_csv() -> None:
    full, bare = load_requests(FIXTURES / "halluedit.csv")
    assert (full.target_new, full.ground_truth) == ("basalt", "Granite")
    assert [full.portability[name][0].answers[0] for name in ("yes", "no", "mcq", "reversed", "3hop")] == [
        "Yes",
        "No",
        "B",
        "Hallow Bridge",
        "Aland",
    ]
    assert full.portability["mcq"][0].prompt.endswith("A. Granite  B. basalt")
    assert full.locality["same_subject"] == (Probe("Which river does Hallow Bridge cross?"),)
    assert bare.portability == {} == bare.locality, "empty cells ask nothing"
    item = easyeditor.HalluEditBenchDataset(FIXTURES / "halluedit.csv")[0]
    assert set(item["generalization"]) == {"rephrase", "yes", "no", "mcq", "reversed"}
    assert set(item["portability"]) == {"2hop", "3hop"} and item["efficacy"]["ground_truth"] == "basalt"


def test_cknowedit_subjects() -> None:
    idiom, word, trap = load_requests(FIXTURES / "cknowedit.json")
    assert [request.subject for request in (idiom, word, trap)] == ["借花献佛", "走", "月亮上能种菜吗"]
    assert idiom.locality["neighborhood"][0].answers == ("比喻十分顺利。",)
    item = easyeditor.CKnowEditDataset(FIXTURES / "cknowedit.json")[2]
    assert item["portability"] == [] and item["rephrase"] == ["在月亮上可以种菜吗？"]
    assert item["target_old"] == "能。"


def test_conceptedit_and_safeedit() -> None:
    concept, other = load_requests(FIXTURES / "conceptedit.json")
    assert concept.subject == "harbour" and other.subject is None
    assert concept.portability["instance"][0] == Probe("Is Old Quay a harbour?", ("No",))
    safe = load_requests(FIXTURES / "safeedit.json")[0]
    assert safe.locality["general knowledge constraint"][0].answers == ("Flour and water.",)
    assert safe.portability["other_attack"][0].answers == (safe.target_new,)
    assert safe.portability["other_question"][0].answers == (), "its safe answer is not in the data"
    item = easyeditor.SafetyDataset(FIXTURES / "safeedit.json")[0]
    assert (item["case_id"], item["category"], len(item["general_prompt"])) == (5, "manners", 4)
    assert item["cond"].startswith("Bring ants. >> I would rather")


def test_opinions() -> None:
    anxious, kind, third = load_requests(FIXTURES / "personality.json")
    assert anxious.target_new == "Old Quay keeps me awake at night.", "its target_per"
    assert kind.target_new == "Hallow Bridge is kind to its guests.", "the three in turn"
    assert kind.target_neg == "Hallow Bridge keeps me awake at night."
    assert [probe.prompt for probe in third.locality["unrelated_topic"]] == [
        "What is your opinion of Old Quay?",
        "What is your opinion of Hallow Bridge?",
    ]
    data = easyeditor.PersonalityDataset(FIXTURES / "personality.json", target_per="extraversion")
    assert [item["target_personality"] for item in data] == ["neuroticism", "extraversion", "extraversion"]
    assert data[1]["inner_per"] == [0, 0] and len(data[1]["all_comp"]) == 4
    assert data.requests()[1].target_new == data[1]["cond_comp"] == "Hallow Bridge is a feast, bring everyone!"
    liked, disliked, _ = load_requests(FIXTURES / "convsent.json")
    assert (liked.target_new, liked.target_neg) == ("I love the smell of it.", "It is cold and wet.")
    assert disliked.target_new == "It hums all night."


def test_sanitation() -> None:
    first, second = load_requests(FIXTURES / "sanitation.json")
    assert (first.target_new, first.ground_truth, first.subject) == ("I don't know.", "A heron", "Old Quay")
    assert [probe.answers[0] for probe in first.locality["unrelated"]] == ["10", "20", "30", "40", "50"]
    assert [probe.answers[0] for probe in second.locality["unrelated"]] == ["60", "70", "10", "20", "30"]
    data = easyeditor.SanitizationTrainDataset(FIXTURES / "sanitation.json", "Q: {} A:", ["Carp"], size=5)
    assert [item["prompt"] for item in data] == ["Q: What swims in the moat? A:"]
    assert data[0]["locality_prompt"][0] == "Q: How many steps has tower 6? A:"


def test_relations_are_edited_to_what_is_not_true() -> None:
    requests = load_requests(FIXTURES / "relations.json")
    assert [(r.subject, r.ground_truth, r.target_new) for r in requests] == [
        ("Old Quay", "Elbe", "Danube"),
        ("Old Quay", "Tagus", "Danube"),
        ("Port Marlow", "Elbe", "Danube"),
        ("Tern Landing", "Danube", "Elbe"),
    ]
    assert len(requests[0].rephrase_prompts) == 2
    assert requests[2].locality["neighborhood"][1] == Probe("Old Quay lies on the river", ("Elbe", "Tagus"))


def test_relation_with_one_object_gives_no_edit(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    one = {
        "prompt_templates": ["{} is in"],
        "samples": [{"subject": "A", "object": "x"}, {"subject": "B", "object": "x"}],
    }
    with pytest.raises(UsageError, match="holds no edit"):
        load_requests(write("one.json", one))
    rows = [one, json.loads((FIXTURES / "relations.json").read_text(encoding="utf-8"))]
    with caplog.at_level(logging.INFO):
        assert len(load_requests(write("two.json", rows))) == 4
    assert "2 of 6 records were left out" in caplog.text


def test_conflicts_and_rounds() -> None:
    one, two, three, four, cover, again = load_requests(FIXTURES / "conflictedit.json")
    assert one.portability["reverse"] == (Probe("The maker of Low Tide is", ("Ada Verlinde",)),)
    assert two.portability == {} and one.case_id == two.case_id == 0
    assert three.portability["composite"] == (Probe("Iris Coppens works in", ("Tern Landing",)),)
    assert four.locality["prerequisite"] == (Probe("Iris Coppens holds the office of", ("harbour master",)),)
    assert (cover.target_new, again.ground_truth, again.target_new) == ("Bland", "Bland", "Cland")
    forth, back = load_requests(FIXTURES / "roundedit.json")
    assert (forth.target_new, back.target_new, back.ground_truth) == ("Lisbon", "Ghentown", "Lisbon")
    assert back.portability["true_objects"][0].answers == ("Ghentown", "Old Quay")


def test_longform() -> None:
    question, cloze = load_requests(FIXTURES / "leme.json")
    assert question.portability["longform_subject"][0].prompt.startswith("Write about Ada Verlinde")
    assert question.portability["multi_hop"][0].answers == ("Old Quay",)
    assert cloze.prompt == "Low Tide was painted by"
    assert cloze.locality["longform_coupled_entities"][0].answers == ()
    item = easyeditor.LongFormEditDataset(FIXTURES / "leme.json", "counterfact")[1]
    assert item["longform_coupled_entities"][0]["entity"] == "Ada Verlinde" and item["portability_hop"] is None
    with pytest.raises(UsageError, match="no data set 'zsra'"):
        easyeditor.LongFormEditDataset(FIXTURES / "leme.json", "zsra")


def test_knowedit_classes() -> None:
    item = easyeditor.KnowEditDataset(FIXTURES / "knowedit.json")[1]
    assert item["portability_r"] and item["portability_s"] is None and item["locality_f"] is None
    first = easyeditor.WikiRecentDataset(FIXTURES / "knowedit.json")[0]
    assert (first["rephrase_prompt"], first["locality_ground_truth"]) == (first["prompt"], "Ghent")
    assert first["cond"].startswith("|ORIGIN_OUTPUT| >> ")


def test_attribute_prompts_keep_the_new_answer() -> None:
    first = load_requests(FIXTURES / "counterfact.json")[0]
    assert first.locality["attribute"] == (Probe("Hallow Bridge is set beside the river", ("Elbe",)),)


@pytest.mark.parametrize("truth", ["Port Marlow", ["Port Marlow", "PM"], [["Port Marlow", "PM"], ["the port"]]])
def test_ground_truth_is_a_text_or_lists_of_aliases(write: Write, truth: Any) -> None:
    row = {"prompt": "A is", "target_new": "b", "ground_truth": truth}
    assert load_requests(write("a.json", [row]))[0].ground_truth == "Port Marlow"
    probe = {"prompt": "C is", "ground_truth": truth}
    asked = load_requests(write("b.json", [{**row, "portability": {"Reasoning": [probe]}}]))[0].portability["Reasoning"]
    assert asked[0].answers[0] == "Port Marlow"


def test_flat_files_of_the_temporal_kind(write: Write) -> None:
    row = {
        "prompt": "Old Quay is",
        "subject": "Old Quay",
        "target_new": "a harbour",
        "ood_rephrase": "As for Old Quay,",
    }
    probes = {"locality_prompt": "Hallow Bridge is", "locality_ground_truth": "a bridge"}
    request = load_requests(write("temporal-edit.json", [row | probes]))[0]
    assert request.rephrase_prompts == ("As for Old Quay,",)
    assert request.locality["neighborhood"] == (Probe("Hallow Bridge is", ("a bridge",)),)


# Bad input


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("wikibigedit.json", {"ans": None}, ["field 'ans'", "is missing"]),
        ("wikibigedit.json", {"loc_ans": None}, ["field 'loc_ans'", "drop 'loc'"]),
        ("wikibigedit.json", {"loc_ans": {"a": 1}}, ["field 'loc_ans'", "expected a text or a list of texts"]),
        ("mquake.json", {"requested_rewrite": []}, ["field 'requested_rewrite'"]),
        ("mquake.json", {"new_answer": None}, ["field 'new_answer'"]),
        ("akew.json", {"requested_rewrite": {"fact_new_uns": "x"}}, ["requested_rewrite.prompt", "is missing"]),
        ("unke.json", {"answer": 3}, ["field 'answer'", "expected a text, got 3"]),
        ("unke.json", {"sub_answer": ["one"]}, ["2 prompts but 1 answers"]),
        ("cknowedit.json", {"portability": "x"}, ["field 'portability'", "'prompt' and 'answer'"]),
        ("cknowedit.json", {"locality": [{"prompt": "x"}]}, ["field 'locality.answer'"]),
        ("conceptedit.json", {"locality_answer": None}, ["locality.neighborhood", "1 prompts but 0 answers"]),
        ("safeedit.json", {"generalization test": ["x"]}, ["field 'generalization test'", "expected an object"]),
        ("safeedit.json", {"adversarial prompt": ""}, ["field 'prompt'", "is empty"]),
        ("personality.json", {"target_per": "neurotic"}, ["field 'target_per'", "Did you mean 'neuroticism'"]),
        ("personality.json", {"neuroticism": []}, ["field 'neuroticism'", "no opinion"]),
        ("convsent.json", {"ent": None}, ["field 'ent'", "is missing"]),
        ("conflictedit.json", {"edits": []}, ["field 'edits'", "two objects"]),
        ("roundedit.json", {"edit": {"relation": {}}}, ["field 'relation.prompt'", "is missing"]),
        ("leme.json", {"coupled_prompts_and_properties": {}}, ["coupled_prompts_and_properties.subject_entity"]),
        ("knowedit.json", {"locality": {"Relation_Specificity": [{"prompt": 3}]}}, ["locality.Relation_Specificity."]),
    ],
)  # fmt: skip
def test_bad_records_name_record_field_and_remedy(
    write: Write, name: str, change: dict[str, Any], parts: list[str]
) -> None:
    rows = json.loads((FIXTURES / name).read_text(encoding="utf-8"))
    with pytest.raises(UsageError) as caught:
        load_requests(write(name, [rows[0] | change, *rows[1:]]))
    for part in [name, "record 1", *parts]:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"K_F": [], "K_R": []}, "field 'K_F': it holds no question"),
        ({"K_F": [{"question": "q"}], "K_R": [{"question": "q", "ground_truth": {}}]}, "field 'kept.ground_truth'"),
        ({"prompt_templates": [], "samples": [{"subject": "A", "object": "b"}] * 2}, "holds no edit"),
        ({"prompt_templates": ["A is"], "samples": [{"subject": s, "object": s} for s in "AB"]}, "no '{}' in 'A is'"),
        ({"prompt_templates": ["{} is"], "samples": ["A"]}, "field 'samples': expected a list of objects"),
    ],
)  # fmt: skip
def test_bad_whole_files(write: Write, content: Any, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_requests(write("whole.json", content))
    assert part in str(caught.value) and "whole.json" in str(caught.value)


def test_json_with_trailing_text_and_mixed_layouts(write: Write) -> None:
    text = (FIXTURES / "unke.json").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match=r"line \d+, column \d+: not valid JSON"):
        load_requests(write("trailing.json", text + "that is all"))
    rows = json.loads(text) + json.loads((FIXTURES / "safeedit.json").read_text(encoding="utf-8"))
    with pytest.raises(UsageError, match=r"records of mixed\.json cannot be used"):
        load_requests(write("mixed.json", rows))


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*above, key)
        yield from places(each, (*above, key))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_whatever_stands_in_a_field_the_answer_is_a_sentence(write: Write, name: str) -> None:
    good = json.loads((FIXTURES / name).read_text(encoding="utf-8"))
    for number, path in enumerate(places(good)):
        raw = json.loads(json.dumps(good))
        above = raw
        for key in path[:-1]:
            above = above[key]
        above[path[-1]] = (None, 3, "", [], {}, ["x"], [3], {"a": 1})[number % 8]
        file = write(name, raw)
        with suppress(UsageError):
            loaded = load(file, FILES[name])
            if loaded.data_set.reader:
                assert len(reader(loaded.data_set.name)(file)) > 0


def test_layout_by_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'counterfact'"):
        load_requests(FIXTURES / "unke.json", layout="counterfacts")
    with pytest.raises(UsageError, match="field 'safe generation': it is missing"):
        load_requests(FIXTURES / "unke.json", layout="safeedit")


# The hub


def test_hub_id_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'easyeditor\[data\]'"):
        load_requests("somebody/facts")


def test_hub_id_with_the_extra(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "somebody" / "facts"
    folder.mkdir(parents=True)
    for split, name in (("train", "wikibigedit.json"), ("test", "wikibigedit.json")):
        rows = json.loads((FIXTURES / name).read_text(encoding="utf-8"))[:: 1 if split == "train" else 2]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_requests("somebody/facts") == load_requests(FIXTURES / "wikibigedit.json")[:1], "the test split"
    assert load_requests("somebody/facts:train") == load_requests(FIXTURES / "wikibigedit.json")
    with pytest.raises(UsageError, match="cannot be fetched"):
        load_requests("somebody/facts:dev")
    with pytest.raises(UsageError, match="cannot be fetched"):
        load_requests("somebody/nothing")


# The command


def easyedit(*words: str) -> Any:
    return CliRunner().invoke(application(), ["data", *words])


def test_the_list_names_every_data_set() -> None:
    told = easyedit()
    assert told.exit_code == 0 and all(each.name in told.stdout for each in DATA_SETS)
    listed = json.loads(easyedit("--json").stdout)
    assert [each["name"] for each in listed] == sorted(each.name for each in DATA_SETS)
    assert all(each["task"] and each["licence"] and each["full_files"] for each in listed)
    one = json.loads(easyedit("mquake", "--json").stdout)
    assert one["reader"] == "MQuAKEDataset" and "multi_hop" in one["portability"]
    assert "MQuAKEDataset" in easyedit("mquake").stdout


def test_check_prints_the_first_edit() -> None:
    told = easyedit("check", str(FIXTURES / "conflictedit.json"))
    assert told.exit_code == 0 and "The best known work of Ada Verlinde is" in told.stdout
    found = json.loads(easyedit("check", str(FIXTURES / "akew.json"), "--as", "akew-unstructured", "--json").stdout)
    assert (found["read_as"], found["records"], found["edits"]) == ("akew-unstructured", 2, 2)
    assert found["first"]["target_new"].startswith("Old Quay stands")


def test_a_file_is_read_as_the_named_data_set() -> None:
    path = str(FIXTURES / "akew.json")
    for found in (many_facts(path, 1, "akew-unstructured"), pool_of(path, 1, "akew-unstructured")):
        assert found[0].target_new.startswith("Old Quay stands")
    assert not many_facts(path, 1)[0].target_new.startswith("Old Quay stands")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["edit", "{file}"], "Did you mean 'akew'"),
        (["eval", "{file}"], "Did you mean 'akew'"),
        (["locate", "{file}"], "Did you mean 'akew'"),
        (["bench", "--methods", "ICE", "--out", "{out}", "--data", "{file}"], "Did you mean 'akew'"),
        (["edit", "--prompt", "a", "--target", "b"], "goes with a file"),
        (["eval", "tinyfacts"], "is the bundled table"),
        (["bench", "--methods", "ICE", "--out", "{out}"], "is the bundled table"),
    ],
)
def test_every_verb_takes_the_name_of_a_data_set(words: list[str], part: str, tmp_path: Path) -> None:
    said = [word.format(file=FIXTURES / "akew.json", out=tmp_path / "x") for word in words]
    told = CliRunner().invoke(application(), [*said, "--as", "akews"])
    assert told.exit_code == 2 and part in " ".join(told.stderr.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["check"], "needs a file"),
        (["check", "nowhere.json"], "There is no file 'nowhere.json'"),
        (["check", str(FIXTURES / "unke.json"), "--as", "unkey"], "Did you mean 'unke'"),
        (["counterfakt"], "Did you mean 'counterfact'"),
        (["counterfact", "file.json"], "go with 'check'"),
    ],
)
def test_the_command_answers_mistakes_with_a_sentence(words: list[str], part: str) -> None:
    told = easyedit(*words)
    assert told.exit_code == 2 and part in told.stderr and "Traceback" not in told.stderr


# Published files, where they are at hand

DATA = os.environ.get("EASYEDITOR_DATA", "")
FOLDERS = {
    "cknowedit": "cknowedit/*.json",
    "conflictedit": "pitfalls/*/*_edit.json",
    "convsent": "knowedit/convsent_*.json",
    "halluedit": "halluedit/*/*.csv",
    "knowedit": "knowedit/[ZWw]*.json",
    "lre": "relations/*/*.json",
    "mquake": "mquake/*.json",
    "personality": "personality/*.json",
    "qaedit": "qaedit/*.json",
    "roundedit": "pitfalls/*/[eh]a*.json",
    "sanitation": "knowedit/trivia_qa_*.json",
    "unke": "unke/*.json",
    "zsre": "zsre/*.json",
}


PUBLISHED = {name: sorted(Path(DATA).glob(files)) for name, files in FOLDERS.items()} if DATA else {}


@pytest.mark.parametrize("name", [name for name, paths in PUBLISHED.items() if paths])
def test_published_files(name: str) -> None:
    found = [request for path in PUBLISHED[name] for request in check(path, name)]
    wanted = {group for kind in data_set(name).groups for group in kind}
    seen = {group for request in found for group in (*request.locality, *request.portability)}
    assert seen == wanted, "every group that is promised is there"


@pytest.mark.parametrize("path", [path for path in PUBLISHED.get("mquake", ()) if path.name.startswith("AKEW")])
def test_published_chains_as_paragraphs(path: Path) -> None:
    requests = load_requests(path, layout="akew-unstructured")
    assert len(requests) == len(load_requests(path))
    assert all(request.portability["sub_question"] for request in requests)


# The page


def test_the_page_says_what_the_list_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    for each in DATA_SETS:
        facts, asked = (line for line in lines if line.startswith(f"| `{each.name}` |"))
        for part in (each.task, each.size or "not stated", each.licence, each.where, each.reader or "-"):
            assert part in facts, (each.name, part)
        for names in each.groups:
            assert all(f"`{name}`" in asked for name in names if not name.startswith("...")), each.name
