"""The owner's policy as a file, what contradicts itself in it, and what a week makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.node import founding
from meshnode.node.founding import PolicyTerms
from meshnode.node.policy_file import (
    PURPOSES,
    PolicyFile,
    changed,
    read_policy,
    terms_of,
    written,
)
from meshnode.node.policy_sense import contradictions
from meshnode.node.policy_trial import Trial, try_policy
from meshnode.protocol import papers
from meshnode.protocol.papers import (
    Band,
    Caps,
    Departure,
    Policy,
    Quiet,
    Resume,
    Submitters,
)
from meshnode.protocol.reasons import Reason
from meshnode.protocol.types import Account, NetworkId
from meshnode.vehicle.battery import PackSpec
from meshnode.vehicle.trace import load_trace

TRACE = load_trace()


def policy_of(terms: PolicyTerms) -> Policy:
    return founding.draft_policy(Account(bytes(32)), NetworkId(bytes(8)), terms)


def read(folder: Path, text: str) -> PolicyFile:
    path = folder / "policy.toml"
    path.write_text(text)
    return read_policy(path)


# ---- the file

MINUTES = st.integers(0, 1439)
TERMS = st.builds(
    PolicyTerms,
    soc_floor_permille=st.integers(0, 100).map(lambda pct: pct * 10),
    reserve_wh=st.integers(0, 10**6),
    day_wh=st.integers(0, 10**6),
    watt_max=st.integers(0, 10**5),
    plugged_rule=st.integers(0, 2),
    temp_dc=st.tuples(st.integers(-500, 0), st.integers(1, 800)),
    low_voltage_mv=st.integers(0, 600).map(lambda tenths: tenths * 100),
    wear_nano_per_kwh=st.integers(0, 10**12),
    tariff=st.lists(
        st.builds(Band, MINUTES, MINUTES, st.integers(0, 10**12)).filter(
            lambda band: (
                (band.last_minute + 1) % 1440 != band.first_minute or band.first_minute == 0
            )
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    efficiency_permille=st.integers(1, 100).map(lambda pct: pct * 10),
    awake_w=st.integers(0, 10**5),
    submitters=st.sampled_from([Submitters.MINE, Submitters.FLEET, Submitters.NETWORK]),
    departures=st.none()
    | st.lists(
        st.builds(Departure, st.integers(0, 6), MINUTES, st.integers(0, 10**6)),
        min_size=1,
        max_size=4,
    ).map(tuple),
    resume=st.none()
    | st.builds(
        Resume,
        st.integers(0, 100).map(lambda pct: pct * 10),
        st.integers(-500, 800),
        st.integers(-500, 800),
    ),
    stationary=st.booleans(),
    quiet=st.none()
    | st.lists(
        st.builds(Quiet, st.integers(1, 127), MINUTES, MINUTES).filter(
            lambda quiet: (quiet.last_minute + 1) % 1440 != quiet.first_minute
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    idle_s=st.integers(0, 1440).map(lambda minutes: minutes * 60),
    caps=st.builds(Caps, *3 * [st.integers(0, 10**9)]),
    metered_bytes_a_day=st.none() | st.integers(0, 10**12),
    wifi_only=st.booleans(),
    disk_interval_s=st.none() | st.integers(0, 86_400),
)


@given(TERMS, st.none() | st.integers(0, 31))
def test_what_is_written_reads_back_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, terms: PolicyTerms, purposes: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "policy.toml"
    path.write_text(written(policy_of(terms), purposes))
    back = read_policy(path)
    assert policy_of(back.terms) == policy_of(terms)
    assert back.purposes == purposes


def test_an_empty_file_is_the_products_own_policy(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n").terms == replace(PolicyTerms())


def test_what_a_file_does_not_say_stays_as_it_was(tmp_path: Path) -> None:
    strict = PolicyTerms(
        soc_floor_permille=700,
        day_wh=500,
        plugged_rule=2,
        temp_dc=(100, 300),
        submitters=Submitters.LIST,
        accounts=(Account(bytes(range(32))),),
        resume=Resume(750, 120, 280),
        stationary=True,
    )
    path = tmp_path / "policy.toml"
    path.write_text("idle_time_to_run = 5")
    assert read_policy(path, strict).terms == replace(strict, idle_s=300)
    bounded = replace(strict, metered_bytes_a_day=7)
    path.write_text('metered_bytes_a_day = "any"')
    assert read_policy(path, bounded).terms == strict
    assert terms_of(policy_of(strict)) == strict
    path.write_text('battery_max_temperature = 25\nsubmitters = "mine"')
    looser = read_policy(path, strict).terms
    assert (looser.temp_dc, looser.submitters, looser.accounts) == (
        (100, 250),
        Submitters.MINE,
        (),
    )
    said = changed(policy_of(strict), policy_of(looser))
    assert "- battery_max_temperature = 30.0" in said and "+ battery_max_temperature = 25.0" in said


def test_keys_that_make_one_field_together(tmp_path: Path) -> None:
    def terms(text: str) -> PolicyTerms:
        return read(tmp_path, text).terms

    assert terms("run_on_batteries = true").plugged_rule == 1
    assert terms("surplus_only = true").plugged_rule == 2
    assert terms('battery_chemistry = "lfp"').wear_nano_per_kwh == 20_000_000
    for lines in (['battery_chemistry = "lfp"', "wear_per_kwh = 0.07"],) * 2:
        assert terms("\n".join(lines)).wear_nano_per_kwh == 70_000_000
        lines.reverse()
    floor = terms("battery_charge_min_pct = 40\nbattery_resume_temperatures = [8, 35.5]")
    assert floor.resume == Resume(420, 80, 355)
    account = "ab" * 32
    only = terms(f'submitters = ["{account}"]')
    assert (only.submitters, only.accounts) == (Submitters.LIST, (bytes.fromhex(account),))
    quiet = terms('[[quiet]]\ndays = ["Fri", "Sat"]\nfrom = "22:00"\nuntil = "07:00"')
    assert quiet.quiet == (Quiet(0b110000, 1320, 419),)
    every = terms('[[departure]]\nat = "07:30"\nwh = 8000').departures
    assert every == tuple(Departure(day, 450, 8000) for day in range(7))
    assert read(tmp_path, 'purposes = ["compute", "plug"]').purposes == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nday_wh = -1", "line 2: day_wh: a whole number from 0"),
        ("day_wh = 1.5", "line 1: day_wh"),
        ("day_wh = true", "line 1: day_wh"),
        ("soc_floor = 30", "line 1: soc_floor: no policy says it"),
        ("battery_max_temperature = nan", "line 1: battery_max_temperature"),
        ("battery_max_temperature = 40.05", "more than one decimal"),
        ("wear_per_kwh = 0.0000000001", "more than nine decimals"),
        ("wear_per_kwh = inf", "an amount from 0"),
        ("run_on_batteries = 1", "true or false"),
        ('submitters = "all"', "mine, fleet, network or a list"),
        ('submitters = ["ab"]', "64 hexadecimal digits"),
        ("submitters = []", "1 to 256 accounts"),
        ('battery_chemistry = "lead"', "one of nmc, lfp"),
        ('purposes = ["rent"]', "'rent' is none of compute"),
        ('sandbox_least = ["walls"]', "walls is no sandbox layer"),
        ('\n\n[[tariff]]\nfrom = "00:00"\nuntil = "24:00"', "line 3: tariff: per_kwh is missing"),
        ('[[quiet]]\nfrom = "7"\nuntil = "8:00"', "a time such as '07:30'"),
        ('[[quiet]]\nfrom = "08:00"\nuntil = "08:00"', "no time at all"),
        ('[[quiet]]\nfrom = "08:00"\nuntil = "09:00"\ndays = ["Mo"]', "a list of Mon"),
        ('[[departure]]\nat = "07:30"\nkm = 5', "km is nothing that it says"),
        ("tariff = 5", "a list, not 5"),
        ("departure = []", "1 to 28"),
        ("day_wh = ", "no TOML"),
        ('purposes = [["a"]]', "['a'] is none of compute"),
        ('battery_chemistry = ["nmc"]', "one of nmc, lfp"),
        ("wear_per_kwh = 1e-9999999999999999999", "no TOML"),
        ("day_wh = " + "[" * 5_000, "no TOML"),
        ("leases_a_day = 3", "no policy says it"),
        ('[[departure]]\nat = "24:00"', "00:00 of the next day"),
    ],
)
def test_what_is_no_policy_is_one_line_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_policy(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="more than 65536 bytes"):
        read(tmp_path, "#" * 70_000)


# ---- contradictions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "battery_charge_min_pct = 50\nbattery_charge_resume_pct = 50",
            "lines 1, 2: work resumes at a charge at which it stops",
        ),
        (
            "network_wifi_only = true\nmetered_bytes_a_day = 5",
            "lines 1, 2: with Wi-Fi only there are no metered bytes to spend",
        ),
        ("watt_max = 0", "line 1: with 0 W nothing ever runs"),
        ("day_wh = 100", "line 1: 100 Wh a day do not last for 15 minutes (138 Wh)"),
        (
            "battery_min_temperature = 20\n\nbattery_max_temperature = 10",
            "lines 1, 3: no battery is between 20.0 and 10.0 degrees",
        ),
        (
            "battery_resume_temperatures = [30, 20]",
            "line 1: work resumes at temperatures at which it stops, or at none",
        ),
        (
            'run_on_batteries = true\npurposes = ["compute", "plug"]',
            "lines 1, 2: the battery may be used by the one and not by the other",
        ),
        ('purposes = ["plug"]', "line 1: without compute the car computes nothing"),
        ('purposes = ["compute"]', "line 1: no energy may be used: neither plug nor battery"),
        (
            "run_on_batteries = true\nsurplus_only = true",
            "lines 1, 2: on surplus only means from the plug: the battery's word is lost",
        ),
        (
            'wear_per_kwh = 0.1\nbattery_chemistry = "nmc"',
            "lines 1, 2: both name the price of wear; the price is taken",
        ),
        (
            '[[tariff]]\nfrom = "06:00"\nuntil = "22:00"\nper_kwh = 0.3',
            "line 1: no band has a price at 00:00; there the dearest one counts",
        ),
        (
            '[[tariff]]\nfrom = "00:00"\nuntil = "24:00"\nper_kwh = 0.3\n'
            '[[tariff]]\nfrom = "05:00"\nuntil = "06:00"\nper_kwh = 0.2',
            "lines 1, 5: two bands have different prices at 05:00",
        ),
        (
            '[[quiet]]\nfrom = "00:00"\nuntil = "12:00"\n'
            '[[quiet]]\nfrom = "12:00"\nuntil = "24:00"',
            "lines 1, 4: every minute of the week is quiet",
        ),
        (
            '[[departure]]\nat = "07:30"\nwh = 1\n[[departure]]\nat = "07:30"\nwh = 2',
            "lines 1, 4: the departure at 07:30 needs 1 Wh and 2 Wh",
        ),
    ],
)
def test_a_policy_that_contradicts_itself(tmp_path: Path, text: str, said: str) -> None:
    found = contradictions(read(tmp_path, text))
    assert said in [str(one) for one in found]
    assert all(one.lines for one in found)


def test_a_policy_against_the_car(tmp_path: Path) -> None:
    pack = PackSpec(60_000, 800)
    floor = contradictions(read(tmp_path, "battery_charge_min_pct = 78"), pack)
    assert str(floor[0]).startswith("line 1: the car charges to 80 %")
    text = 'run_on_batteries = true\n[[departure]]\nat = "07:30"\nwh = 30000'
    reserve = contradictions(read(tmp_path, text), pack)
    said = "lines 1, 2: 30000 Wh in reserve leave nothing of the 30000 Wh above the floor"
    assert [str(one) for one in reserve] == [said]
    assert contradictions(read(tmp_path, "")) == contradictions(read(tmp_path, ""), pack) == []


# ---- the trial


def tried(terms: PolicyTerms, **more: Any) -> Trial:
    return try_policy(policy_of(terms), TRACE, **more)


def test_the_products_own_policy_on_the_shipped_week() -> None:
    trial = tried(PolicyTerms())
    assert sum(trial.minutes_of().values()) == 7 * 1440 == len(trial.charge_permille)
    assert trial.from_battery_mwh == 0 and trial.wear_nano == 0  # plugged in only
    assert trial.work_min + trial.standby_min == trial.minutes_of()[Reason.OK]
    # 550 W for the minutes of work and 250 W for those of waiting, within rounding.
    assert trial.work_mwh == pytest.approx(trial.work_min * 550_000 / 60, rel=0.001)
    assert trial.standby_mwh == pytest.approx(trial.standby_min * 250_000 / 60, rel=0.001)
    bought = (trial.work_mwh + trial.standby_mwh) / 0.9
    assert trial.grid_mwh == pytest.approx(bought, rel=0.001)
    assert trial.energy_nano == pytest.approx(trial.grid_mwh / 1e6 * 0.3 * 1e9, rel=0.001)


@pytest.mark.parametrize("busy_pct", [50, 80, 100])
def test_income_covers_what_work_and_waiting_cost(busy_pct: int) -> None:
    """What the last wait cost is still due when the week ends: an hour of work pays for it."""
    for rule in (0, 1):
        trial = tried(PolicyTerms(plugged_rule=rule), busy_pct=busy_pct)
        cost = trial.energy_nano + trial.wear_nano
        assert trial.income_nano >= cost * 0.98


def test_work_costs_the_day_no_more_than_its_energy_and_never_the_floor() -> None:
    trial = tried(PolicyTerms(plugged_rule=1, day_wh=3_000, soc_floor_permille=600), busy_pct=100)
    assert trial.below_floor_min == 0
    for day in range(7):
        worked = sum(
            min(one.until_min, (day + 1) * 1440) - max(one.from_min, day * 1440)
            for one in trial.stretches
            if one.working and one.from_min < (day + 1) * 1440 and one.until_min > day * 1440
        )
        assert worked * 550 / 60 <= 3_000


@given(
    st.integers(0, 100),
    st.integers(0, 40_000),
    st.integers(0, 30_000),
    st.integers(50, 5_000),
    st.integers(0, 2),
    st.integers(0, 100),
)
@settings(max_examples=6)
def test_no_policy_takes_the_car_below_its_floor_or_a_drive_its_charge(
    floor_pct: int, reserve_wh: int, day_wh: int, watt_max: int, rule: int, busy_pct: int
) -> None:
    trial = tried(
        PolicyTerms(
            soc_floor_permille=floor_pct * 10,
            reserve_wh=reserve_wh,
            day_wh=day_wh,
            watt_max=watt_max,
            plugged_rule=rule,
        ),
        busy_pct=busy_pct,
    )
    assert trial.below_floor_min == 0
    if reserve_wh >= 7_000:  # the longest drive of the week
        assert trial.short_wh == trial.short_without_wh


def test_quiet_hours_and_departures_are_seen_in_the_week() -> None:
    night = (Quiet(127, 1320, 359),)
    trial = tried(PolicyTerms(plugged_rule=1, quiet=night), busy_pct=100)
    quiet = [one for one in trial.stretches if one.reason is Reason.QUIET_HOURS]
    assert quiet and all(
        one.from_min % 1440 >= 1320 or one.until_min % 1440 <= 360 for one in quiet
    )
    # A lease ends before the departure that the owner has named.
    monday = (Departure(0, 450, 0),)
    trial = tried(PolicyTerms(plugged_rule=1, departures=monday, day_wh=50_000), busy_pct=100)
    at_departure = [one for one in trial.stretches if one.from_min < 450 <= one.until_min]
    assert not any(one.working and one.until_min > 450 for one in at_departure)


def test_every_purpose_has_a_name() -> None:
    bits = [getattr(papers, name) for name in dir(papers) if name.startswith("PURPOSE_")]
    assert sorted(PURPOSES.values()) == sorted(bits)


def test_a_table_that_has_come_is_seen_whatever_its_lines() -> None:
    """Two nights of which each line stands elsewhere in the file too."""
    before = policy_of(PolicyTerms(quiet=(Quiet(1, 0, 59), Quiet(2, 60, 119))))
    after = replace(before, quiet=(*(before.quiet or ()), Quiet(1, 60, 119)))
    assert changed(before, after) == [
        "+ [[quiet]]", '+ days = ["Mon"]', '+ from = "01:00"', '+ until = "02:00"',
    ]  # fmt: skip
    assert changed(before, before) == []
