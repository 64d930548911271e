"""config.toml: what it may say, and the one line that tells a person what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode import config
from meshnode.errors import UsageError


def written(home: Path, text: str) -> config.NodeConfig:
    (home / "config.toml").write_text(text)
    return config.load(home, config.parked_car())


def test_no_file_is_the_preset(tmp_path: Path) -> None:
    assert config.load(tmp_path, config.submitter()) == config.submitter()


def test_single_fields_are_replaced(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        '[node]\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n[limits]\noffer_tries_max = 5\n'
        "[vehicle]\npoll_s = 2\n",
    )
    assert found.node.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert found.limits.offer_tries_max == 5
    assert found.vehicle.poll_s == 2.0
    assert found.compute == config.parked_car().compute


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[nodes]\n", "no table [nodes]"),
        ("[compute]\nslot = 2\n", "compute.slot is no setting"),
        ("[compute]\nslots = true\n", "compute.slots must be a whole number"),
        ("[compute]\nslots = -1\n", "compute.slots must be a whole number"),
        ('[node]\nlisten = "x"\n', "node.listen must be a list"),
        ("[node]\nlisten = [1]\n", "node.listen must be a text"),
        ("[node\n", "no TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"config\.toml") as caught:
        written(tmp_path, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
