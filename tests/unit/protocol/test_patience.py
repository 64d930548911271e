"""Waiting as long as answers usually take, and longer for who keeps us waiting."""

from __future__ import annotations

from meshnode.protocol.patience import PATIENCE_MS_MAX, Patience


def test_it_waits_the_least_until_answers_are_slower() -> None:
    patience = Patience()
    assert patience.wait_ms(150, 0) == 150
    for _ in range(30):
        patience.answered(20)
    assert patience.wait_ms(150, 0) == 150 and patience.smoothed_ms == 20
    for _ in range(40):
        patience.answered(200)
    assert 200 <= patience.wait_ms(150, 0) < 400, "steady and slow"
    for took_ms in (100, 500) * 20:
        patience.answered(took_ms)
    assert patience.wait_ms(150, 0) > 600, "and wavering"


def test_it_doubles_with_what_is_lost_and_ends_somewhere() -> None:
    patience = Patience()
    patience.answered(100)
    waits = [patience.wait_ms(150, lost) for lost in range(6)]
    assert waits[:3] == [300, 600, 1_200] and waits[3:] == [PATIENCE_MS_MAX] * 3
    assert patience.wait_ms(5_000, 3) == 5_000, "round trips count more"
