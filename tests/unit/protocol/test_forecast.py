"""How long cars stay: the published figures, and what any such forecast must hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.protocol.forecast import KINDS, LEASE_PROBABILITY, STEP_S, Parking, Stay

DAY_S = 86_400
H = 3_600
AHEAD_S = st.integers(0, 14 * DAY_S)
STAYS = st.builds(
    Stay,
    st.one_of(st.none(), st.sampled_from(KINDS)),
    st.one_of(st.none(), st.integers(-5, 60 * DAY_S)),
    st.one_of(st.none(), st.integers(0, 7 * DAY_S)),
)

# Per cent of cars met at a random moment that leave within 1 min, 15 min, 1 h, 4 h, as drawn by a
# simulation of the same tables; and hours of the quartiles and the mean of a whole stay.
LEAVES: dict[Parking, tuple[float, ...]] = {
    "home": (0.14, 2.1, 8.3, 30.0),
    "work": (0.26, 3.8, 15.0, 50.0),
}
QUARTILES_H: dict[Parking, tuple[float, float, float, float, float]] = {
    "home": (4.2, 11.0, 14.6, 20.3, 11.8),
    "public": (1.7, 4.4, 12.1, 17.1, 7.9),
    "work": (2.5, 4.9, 8.5, 9.8, 6.3),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_the_published_chances_of_leaving(kind: Parking) -> None:
    met = Stay(kind)
    for ahead_s, percent in zip((60, 900, H, 4 * H), LEAVES[kind], strict=True):
        assert 100 * (1 - met.stays_until(ahead_s)) == pytest.approx(percent, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_quantiles_of_a_whole_stay(kind: Parking) -> None:
    *quantiles, mean_h = QUARTILES_H[kind]
    new = Stay(kind, 0)
    for left, hours in zip((0.75, 0.5, 0.25, 0.1), quantiles, strict=True):
        # Those that are gone before anybody could count them, 2 % at work, are left out here.
        assert new.stays_until(hours * H) == pytest.approx(left, abs=0.011)
    every_s = 60
    area = sum(new.stays_until(at) * every_s for at in range(0, 30 * DAY_S, every_s))
    assert area / H == pytest.approx(mean_h, rel=0.04)


def test_the_hazard_depends_on_how_long_it_is_parked() -> None:
    """At work after 8 h one in twelve leaves within a quarter of an hour, after 2 h hardly any."""
    assert 1 - Stay("work", 8 * H).stays_until(900) == pytest.approx(0.08, abs=0.01)
    assert Stay("work", 8 * H).stays_until(900) < Stay("work", H).stays_until(900)
    assert Stay("home", 30 * DAY_S).stays_until(H) == Stay("home", 60 * DAY_S).stays_until(H)


@given(STAYS, AHEAD_S, AHEAD_S)
def test_staying_longer_is_never_likelier(stay: Stay, one_s: int, other_s: int) -> None:
    sooner, later = sorted((one_s, other_s))
    assert 0.0 <= stay.stays_until(later) <= stay.stays_until(sooner) <= 1.0
    assert stay.stays_until(0) == 1.0


@given(st.sampled_from(KINDS), st.integers(0, DAY_S), st.integers(0, DAY_S), st.integers(0, DAY_S))
def test_having_stayed_is_a_condition(kind: Parking, parked_s: int, one_s: int, two_s: int) -> None:
    """P(stays one and two more) = P(stays one more) P(stays two more, having stayed one)."""
    whole = Stay(kind, parked_s).stays_until(one_s + two_s)
    after = Stay(kind, parked_s + one_s).stays_until(two_s)
    assert whole == pytest.approx(Stay(kind, parked_s).stays_until(one_s) * after, abs=1e-9)


@given(STAYS, st.floats(0.01, 0.999), st.integers(1, 2 * DAY_S))
def test_the_lease_is_the_inverse(stay: Stay, probability: float, most_s: int) -> None:
    lease_s = stay.lease_s_at(probability, most_s)
    assert 0 <= lease_s <= most_s
    assert stay.stays_until(lease_s) >= probability
    if lease_s + STEP_S <= most_s:
        assert stay.stays_until(lease_s + STEP_S) < probability
    if stay.departs_s is not None:
        assert lease_s == min(most_s, stay.departs_s)


@given(STAYS)
def test_the_unknown_kind_is_the_one_that_leaves_first(stay: Stay) -> None:
    of_each = [Stay(kind, stay.parked_s, stay.departs_s).stays_until(H) for kind in KINDS]
    assert Stay(None, stay.parked_s, stay.departs_s).stays_until(H) == min(of_each)


@given(st.sampled_from(KINDS), st.integers(0, 60 * DAY_S))
def test_a_parked_car_always_has_minutes(kind: Parking, parked_s: int) -> None:
    """No stay has a moment at which one car in ten leaves: a forecast alone stops no car."""
    assert Stay(kind, parked_s).lease_s_at(LEASE_PROBABILITY, DAY_S) >= 5 * 60
