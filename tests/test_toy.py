"""The toy world: what the models that were taught it know.

These tests run first, so that of several processes each teaches its share of the families and none waits for another.
"""

from __future__ import annotations

import pytest

import toy
from easyeditor.lm.generate import answer

TAUGHT = [
    pytest.param(family, marks=() if family in toy.fast("FT") else pytest.mark.slow)  # FT is tried on all
    for family in toy.FAMILIES
]


@pytest.mark.parametrize("family", TAUGHT)
def test_a_taught_model_knows_every_fact_in_every_wording(family: str) -> None:
    asked = toy.prompts()
    assert answer(toy.taught(family), [prompt for prompt, _, _ in asked], 4, 64) == [fact for _, _, fact in asked]
