"""`meshnode policy` and `meshnode consent`, without a node that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.cli.car import meshnode
from meshnode.errors import VerificationFailed
from meshnode.node import armor, firstrun, terms
from meshnode.node.founding import ConsentTerms, PolicyTerms
from meshnode.protocol.papers import T_CONSENT
from tests import json_shape

from .test_commands import run


def test_a_policy_is_shown_changed_and_put_in_force(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    code, out, _ = run(capfd, "policy", "show", *at, group=meshnode)
    assert code == 0 and "battery_charge_min_pct = 30\n" in out
    file = tmp_path / "policy.toml"
    file.write_text(out.replace("battery_charge_min_pct = 30", "battery_charge_min_pct = 55"))
    before = terms.in_force(home)
    assert before is not None
    code, out, _ = run(capfd, "policy", "set", str(file), "--json", *at, group=meshnode)
    put = json_shape.check("policy-set", out)
    after = terms.in_force(home)
    assert code == 0 and after is not None
    assert after.policy.soc_floor_permille == 550
    assert after.policy_sealed.digest.hex() == put["policy"]
    # The consent is to the new policy, names the one before, and nothing else has changed.
    assert after.consent.policy == after.policy_sealed.digest
    assert after.consent.replaces == before.consent_sealed.digest
    assert after.consent.purposes == before.consent.purposes
    assert after.consent.lapses_ms == before.consent.lapses_ms
    assert after.consent.vehicle != before.consent.vehicle  # a pseudonym links no two consents
    code, out, _ = run(capfd, "policy", "show", "--json", *at, group=meshnode)
    assert json_shape.check("policy-show", out)["digest"] == put["policy"]


def test_a_change_that_a_crash_cut_in_two_leaves_what_held_before(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = terms.in_force(home)
    assert before is not None
    papers = terms.change(
        home, PolicyTerms(watt_max=77), ConsentTerms(), vehicle=bytes(16), now_ms=1
    )
    armor.write_file(home / firstrun.POLICY_FILE, [armor.block_of(papers[0])])  # and no consent
    assert (found := terms.in_force(home)) and found.policy == before.policy
    now_ms = before.consent.given_ms
    identity = firstrun.load_identity(home, cell="garage", now_ms=now_ms)
    assert identity.policy == before.policy_sealed.wire
    terms.install_terms(home, papers)
    assert (found := terms.in_force(home)) and found.policy.watt_max == 77


def test_a_policy_that_contradicts_itself_is_not_put_in_force(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("day_wh = 100\n\nwatt_max = 0\n")
    at = ("--home", str(home))
    code, _, err = run(capfd, "policy", "set", str(file), *at, group=meshnode)
    assert code == 2 and "line 3: with 0 W nothing ever runs" in err and "--anyway" in err
    assert (found := terms.in_force(home)) and found.policy.watt_max == 300
    code, _, _ = run(capfd, "policy", "set", str(file), "--anyway", *at, group=meshnode)
    assert code == 0 and (found := terms.in_force(home)) and found.policy.watt_max == 0
    code, out, err = run(capfd, "policy", "test", str(file), *at, group=meshnode)
    assert code == 2 and "works     0 min" in out and "line 3" in err
    file.write_text("watts = 5\n")
    code, _, err = run(capfd, "policy", "test", str(file), *at, group=meshnode)
    assert code == 2 and err.count("\n") == 1 and "line 1: watts: no policy says it" in err


def test_a_policy_is_tried_on_the_shipped_week(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    code, out, err = run(capfd, "policy", "test", "--minutes", "--busy", "80", *at, group=meshnode)
    assert code == 0 and not err
    assert "the owner allows work only while plugged in" in out and "income" in out
    assert out.startswith("Mon 00:00  ")
    nowhere = ("--home", str(tmp_path / "nowhere"))  # before there is a car at all
    code, out, _ = run(capfd, "policy", "test", "--json", *nowhere, group=meshnode)
    found = json_shape.check("policy-test", out)
    assert code == 0 and found["trace"] == "commuter" and found["below_floor_min"] == 0
    trace = tmp_path / "trace.toml"
    trace.write_text("name = 1\n")
    code, _, err = run(capfd, "policy", "test", "--trace", str(trace), *at, group=meshnode)
    assert code == 2 and "is no trace" in err


def test_init_takes_a_policy_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("run_on_batteries = true\nbattery_charge_min_pct = 60\nreserve_wh = 0\n")
    at = ("--home", str(tmp_path / "home"))
    words = ("init", "--new", "garage", "--accept-notice", "--policy", str(file))
    code, _, err = run(capfd, *words, "--watt-max", "5", *at, group=meshnode)
    assert code == 2 and "--watt-max says it twice" in err
    assert run(capfd, *words, *at, group=meshnode)[0] == 0
    found = terms.in_force(tmp_path / "home")
    assert found is not None and found.policy.plugged_rule == 1
    assert found.consent.purposes & 8  # energy out of the battery


def test_consent_is_shown_withdrawn_given_again_and_remembered(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    code, out, _ = run(capfd, "consent", "show", "--json", *at, group=meshnode)
    first = json_shape.check("consent-show", out)["consent"]
    assert code == 0 and first["purposes"] == ["compute", "network", "plug"]
    code, out, _ = run(capfd, "consent", "withdraw", "--json", *at, group=meshnode)
    ended = json_shape.check("consent-withdraw", out)
    assert code == 0 and ended["signed"] is True
    code, out, _ = run(capfd, "consent", "show", "--json", *at, group=meshnode)
    shown = json_shape.check("consent-show", out)["consent"]
    assert shown["withdrawn_ms"] and shown["replaces"] == first["digest"]
    code, _, err = run(capfd, "consent", "withdraw", *at, group=meshnode)
    assert code == 2 and "no consent to withdraw" in err
    code, out, _ = run(capfd, "policy", "show", *at, group=meshnode)
    file = home / "policy.toml"
    file.write_text(out)
    code, _, err = run(capfd, "policy", "set", str(file), *at, group=meshnode)
    assert code == 2 and "gives no consent" in err  # a policy gives none by itself
    words = ("consent", "give", "--policy", str(file), "--accept-notice", "--json")
    code, out, _ = run(capfd, *words, *at, group=meshnode)
    again = json_shape.check("consent-show", out)["consent"]
    assert code == 0 and again["withdrawn_ms"] is None and again["replaces"] == ended["consent"]
    code, out, _ = run(capfd, "consent", "history", "--json", *at, group=meshnode)
    past = json_shape.check("consent-history", out)["consents"]
    assert [one["digest"] for one in past] == [first["digest"], ended["consent"], again["digest"]]
    code, out, _ = run(capfd, "consent", "history", *at, group=meshnode)
    assert code == 0 and "withdrawn" in out
    code, out, _ = run(capfd, "consent", "show", *at, group=meshnode)
    assert code == 0 and "operator  yourself" in out


def test_a_home_that_only_asks_gives_no_consent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(tmp_path / "submitter"))
    assert run(capfd, "init", "--new", "garage", *at)[0] == 0
    code, _, err = run(capfd, "consent", "give", "--accept-notice", *at, group=meshnode)
    assert code == 2 and "only asks; meshnode init makes a car of it" in err


def test_a_withdrawn_consent_is_not_put_back(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = (home / firstrun.CONSENT_FILE).read_text()
    at = ("--home", str(home))
    assert run(capfd, "consent", "withdraw", *at, group=meshnode)[0] == 0
    answer = tmp_path / "answer.mesh"
    answer.write_text(kept)
    sealed = armor.read_one(answer, T_CONSENT)
    with pytest.raises(VerificationFailed, match="has been withdrawn"):
        terms.install_terms(home, (sealed,))


def test_what_is_damaged_does_not_stand_between_owner_and_stop(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    (home / firstrun.POLICY_FILE).write_text("garbage")
    assert run(capfd, "pause", *at, group=meshnode)[0] == 0
    code, out, _ = run(capfd, "consent", "withdraw", "--json", *at, group=meshnode)
    assert code == 0 and json_shape.check("consent-withdraw", out)["signed"] is False
    assert not (home / firstrun.CONSENT_FILE).exists()


def test_without_the_accounts_key_the_car_can_still_stop(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = ("--home", str(home))
    account = firstrun.standing(home).account
    (home / "account.key").unlink()
    (home / firstrun.ACCOUNT_FILE).write_text(account.hex())
    code, _, err = run(capfd, "policy", "set", str(_shown(home, capfd)), *at, group=meshnode)
    assert code == 2 and "meshnode consent request --policy FILE" in err
    code, out, _ = run(capfd, "consent", "withdraw", "--json", *at, group=meshnode)
    assert code == 0 and json_shape.check("consent-withdraw", out)["signed"] is False
    code, out, _ = run(capfd, "consent", "show", *at, group=meshnode)
    assert code == 0 and out.startswith("no consent: this car computes nothing")


def _shown(home: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    code, out, _ = run(capfd, "policy", "show", "--home", str(home), group=meshnode)
    assert code == 0
    file = home / "shown.toml"
    file.write_text(out)
    return file
