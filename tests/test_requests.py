"""A request is right when it exists: every field, every error with record, field and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest, Probe, probes_of

GOOD: dict[str, Any] = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}


def test_the_layout_of_existing_scripts() -> None:
    found = EditRequest.from_dict(
        {
            **GOOD,
            "ground_truth": ["Paris", "Lutetia"],
            "rephrase_prompt": "France's capital is",
            "target_neg": "Paris",
            "case_id": 7,
            "locality": {
                "neighborhood": {"prompt": ["Spain:", "Italy:"], "ground_truth": ["Madrid", ["Rome", "Roma"]]},
                "none": {"prompt": None, "ground_truth": None},
                "absent": None,
                "open": {"prompt": "Q"},
            },
            "portability": {"hop": [{"prompt": "a", "ground_truth": [["x", "y"], "z"]}, {"prompt": "b"}]},
        },
        "Record 3",
    )
    assert found.ground_truth == "Paris" and found.rephrase_prompts == ("France's capital is",) and found.case_id == 7
    assert dict(found.locality) == {
        "neighborhood": (Probe("Spain:", ("Madrid",)), Probe("Italy:", ("Rome", "Roma"))),
        "open": (Probe("Q"),),
    }
    assert found.portability["hop"] == (Probe("a", ("x", "y", "z")), Probe("b"))
    again = EditRequest.from_dict(found.to_dict())
    assert again.locality == found.locality and again.rephrase_prompts == found.rephrase_prompts
    assert again.to_dict() == found.to_dict() and again.portability == found.portability


def test_the_record_is_no_part_of_what_is_said() -> None:
    assert EditRequest.from_dict(GOOD, "Record 1") == EditRequest.from_dict(GOOD, "Record 2")


@pytest.mark.parametrize("given", ["one", ["one"], ("one",)])
def test_rephrasings(given: Any) -> None:
    assert EditRequest(**GOOD, rephrase_prompts=given).rephrase_prompts == ("one",)
    assert EditRequest.from_dict({**GOOD, "rephrase_prompt": given}).rephrase_prompts == ("one",)
    assert EditRequest.from_dict({**GOOD, "rephrase_prompts": given}).rephrase_prompts == ("one",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "field 'prompt': expected a text, got None"),
        ({"prompt": 3}, "field 'prompt': expected a text, got 3"),
        ({"prompt": " \n"}, "field 'prompt': it is empty"),
        ({"target_new": ""}, "field 'target_new': it is empty. Give the answer"),
        ({"target_new": ["a"]}, "field 'target_new': expected a text"),
        ({"target_new": None}, "field 'target_new': expected a text, got None"),
        ({"subject": ""}, "field 'subject': it is empty"),
        ({"subject": "Spain"}, "field 'subject': 'Spain' does not occur in the prompt"),
        ({"subject": "france"}, "Copy the subject exactly as the prompt spells it"),
        ({"rephrase_prompt": ["a", ""]}, "field 'rephrase_prompt': it is empty"),
        ({"rephrase_prompt": 5}, "field 'rephrase_prompt': expected a text, got 5"),
        ({"locality": "x"}, "field 'locality': expected {name:"),
        ({"locality": {"n": "x"}}, "field 'locality.n': expected a dict"),
        ({"locality": {"n": {"ground_truth": "x"}}}, "field 'locality.n': a probe without 'prompt'"),
        ({"portability": {"n": [3]}}, "field 'portability.n': a probe without 'prompt'"),
        ({"portability": {"n": {"prompt": ["a", "b"], "ground_truth": ["x"]}}}, "2 prompts but 1 answers"),
        ({"portability": {"n": {"prompt": ["a", "b"], "ground_truth": "x"}}}, "2 prompts but 1 answers"),
        ({"locality": {"n": {"prompt": ["a", 3], "ground_truth": ["x", "y"]}}}, "field 'locality.n': expected a text"),
        ({"targt_new": "x"}, "unknown field 'targt_new'. Did you mean 'target_new'?"),
    ],
)
def test_errors_name_record_field_and_remedy(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        EditRequest.from_dict({**GOOD, **change}, "Record 12")
    text = str(caught.value)
    assert says in text and text.startswith("Record 12") and "\n" not in text.replace("' \\n'", "")


@pytest.mark.parametrize("missing", ["prompt", "target_new"])
def test_missing_fields(missing: str) -> None:
    with pytest.raises(UsageError, match=f"field '{missing}': it is missing"):
        EditRequest.from_dict({key: value for key, value in GOOD.items() if key != missing})
    with pytest.raises(UsageError, match="is a list; a request is a dict"):
        EditRequest.from_dict([])  # type: ignore[arg-type]


def test_what_a_method_needs() -> None:
    request = EditRequest(prompt="a", target_new="b", record="Record 4")
    request.require((), "FT")
    with pytest.raises(UsageError, match="Record 4, field 'subject': ROME needs it and it is missing"):
        request.require(("subject",), "ROME")


def test_probes_of() -> None:
    assert probes_of("r", "f", "a", None) == (Probe("a"),)
    assert probes_of("r", "f", "a", ["x", "y"]) == (Probe("a", ("x", "y")),)
    assert probes_of("r", "f", ["a"], "x") == (Probe("a", ("x",)),)
    assert probes_of("r", "f", ["a", "b"], None) == (Probe("a"), Probe("b"))
    assert probes_of("r", "f", "a", [1.5, ["", " "], 2]) == (Probe("a", ("1.5", "2")),)
