"""`mesh account narrow` and `meshnode fleet`: an operator's terms on a car of its fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.car import meshnode
from meshnode.cli.mesh import mesh
from meshnode.ledger.lock import hold_home
from meshnode.node import firstrun, terms
from tests import json_shape

from .test_commands import run


@pytest.fixture
def fleet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """An operator's home and a car's whose owner's consent names it."""
    operator, car = tmp_path / "operator", tmp_path / "car"
    words = ("init", "--new", "vans", "--kind", "fleet", "--home", str(operator))
    assert run(capfd, *words, group=mesh)[0] == 0
    account = firstrun.account_of(operator)[0].hex()
    genesis = str(operator / firstrun.GENESIS_FILE)
    joins = ("init", "--genesis", genesis, "--operator", account, "--accept-notice")
    assert run(capfd, *joins, "--home", str(car), group=meshnode)[0] == 0
    return operator, car


def operator_of(home: Path) -> str:
    return firstrun.account_of(home)[0].hex()


def narrow(operator: Path, text: str, capfd: pytest.CaptureFixture[str]) -> Path:
    file, out = operator / "fleet.toml", operator / "fleet.mesh"
    file.write_text(text)
    words = ("account", "narrow", str(file), "-o", str(out), "--home", str(operator))
    code, _, err = run(capfd, *words, group=mesh)
    assert code == 0, err
    return out


def test_a_fleet_narrows_a_car(
    fleet: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    operator, car = fleet
    at = ("--home", str(car))
    code, out, _ = run(capfd, "fleet", "show", *at, group=meshnode)
    assert code == 0 and "no fleet terms" in out
    word = narrow(operator, "battery_charge_min_pct = 60\nday_wh = 9000\n", capfd)
    code, out, _ = run(capfd, "fleet", "install", str(word), *at, group=meshnode)
    assert code == 0 and "- battery_charge_min_pct = 30\n+ battery_charge_min_pct = 60\n" in out
    assert "day_wh" not in out  # the owner's 5,000 are less
    found = terms.in_force(car)
    assert found is not None and found.fleet_sealed is not None
    assert (found.policy.soc_floor_permille, found.in_effect.soc_floor_permille) == (300, 600)
    identity = firstrun.load_identity(car, cell="vans", now_ms=found.consent.given_ms)
    assert identity.fleet == found.fleet_sealed.wire
    code, out, _ = run(capfd, "fleet", "show", "--json", *at, group=meshnode)
    shown = json_shape.check("fleet-show", out)
    assert shown["fleet"]["digest"] == found.fleet_sealed.digest.hex()
    # What the owner does later stands, as far as the fleet goes with it.
    file = tmp_path / "policy.toml"
    file.write_text("battery_charge_min_pct = 70\n")
    code, _, err = run(capfd, "policy", "set", str(file), *at, group=meshnode)
    assert code == 0 and (now := terms.in_force(car)) and now.in_effect.soc_floor_permille == 700
    code, out, err = run(capfd, "policy", "show", *at, group=meshnode)
    assert "battery_charge_min_pct = 70" in out and "meshnode fleet show" in err
    code, out, _ = run(capfd, "fleet", "drop", "--json", *at, group=meshnode)
    assert code == 0 and json_shape.check("fleet-show", out) == {
        "version": 1, "fleet": None, "changes": [],
    }  # fmt: skip


def test_nobody_elses_terms_and_no_damaged_ones(
    fleet: tuple[Path, Path], home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    operator, car = fleet
    at = ("--home", str(car))
    word = narrow(operator, "day_wh = 100\n", capfd)
    code, _, err = run(capfd, "fleet", "install", str(word), "--home", str(home), group=meshnode)
    assert code == 5 and "another network" in err  # the garage's car is in no fleet
    code, _, err = run(capfd, "fleet", "install", str(tmp_path / "none"), *at, group=meshnode)
    assert code == 2 and "error:" in err and err.count("\n") == 1
    policy = car / firstrun.POLICY_FILE
    code, _, err = run(capfd, "fleet", "install", str(policy), *at, group=meshnode)
    assert code != 0 and err.count("\n") == 1
    assert run(capfd, "fleet", "install", str(word), *at, group=meshnode)[0] == 0
    # Damaged terms: what they forbade is not known, so nothing runs.
    (car / firstrun.FLEET_FILE).write_text("nothing\n")
    assert firstrun.load_identity(car, cell="vans", now_ms=1).consent is None
    code, _, err = run(capfd, "fleet", "show", *at, group=meshnode)
    assert code == 5 and "meshnode fleet drop" in err and err.count("\n") == 1
    # What the owner says needs none of it, and a new consent is not half put in force.
    assert run(capfd, "policy", "show", *at, group=meshnode)[0] == 0
    before = terms.in_force(car, fleet=False)
    words = ("consent", "give", "--operator", operator_of(operator), "--accept-notice", *at)
    code, _, err = run(capfd, *words, group=meshnode)
    assert code == 5 and "meshnode fleet drop" in err
    assert terms.in_force(car, fleet=False) == before
    assert terms.withdrawal(car, 1) is not None  # signed all the same
    assert run(capfd, "fleet", "drop", *at, group=meshnode)[0] == 0
    # While a node starts, nobody takes its terms away under it.
    with hold_home(car):
        code, _, err = run(capfd, "fleet", "drop", *at, group=meshnode)
        assert code == 8 and "in use" in err
    # Another operator in the consent: the old one's terms are not in force.
    assert run(capfd, "fleet", "install", str(word), *at, group=meshnode)[0] == 0
    alone = ("consent", "give", "--accept-notice", *at)
    assert run(capfd, *alone, group=meshnode)[0] == 0
    found = terms.in_force(car)
    assert found is not None and found.fleet_sealed is None
    code, _, err = run(capfd, "fleet", "install", str(word), *at, group=meshnode)
    assert code == 5 and "as operator" in err
