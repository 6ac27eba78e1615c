"""Seconds by part: a part inside another counts for itself only, and nothing is measured when nobody listens."""

from __future__ import annotations

import time

import pytest

from easyeditor.lm.clock import Times, listening, spent


def test_parts_add_up_to_the_whole() -> None:
    start = time.perf_counter()
    with listening() as times, spent("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with spent("inner"):
                time.sleep(0.01)
    whole = time.perf_counter() - start
    assert set(times.seconds) == {"outer", "inner"}
    assert times.seconds["inner"] >= 0.02
    assert times.seconds["outer"] >= 0.02
    assert sum(times.seconds.values()) <= whole
    assert not times.inside


def test_a_function_can_be_a_part_and_an_error_goes_through() -> None:
    @spent("work")
    def work(fails: bool) -> int:
        if fails:
            raise ValueError
        return 1

    assert work(False) == 1  # nobody listens
    with listening() as times:
        assert work(False) == 1
        first = times.seconds["work"]
        with pytest.raises(ValueError):
            work(True)
    assert times.seconds["work"] >= first > 0


def test_listening_inside_listening_hears_the_inner_part_alone() -> None:
    with listening() as outer:
        with listening() as inner, spent("a"):
            pass
        with spent("b"):
            pass
    assert set(inner.seconds) == {"a"}
    assert set(outer.seconds) == {"b"}
    assert Times().seconds == {}
