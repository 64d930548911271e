"""What all commands share: lazy loading, one line per error, exit codes, JSON, where a home is.

`main` of `mesh.py` and `car.py` calls `run`, which turns every end into an exit status: the exit
code of the error's class, 2 for usage, 130 for Ctrl-C with the line that returns to the job.
Imports click and nothing heavier.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click
from click.core import ParameterSource

from meshnode.errors import ArtifactRefused, LocalResource, MeshError, UsageError
from meshnode.node.home import home_path, run_base

JSON_VERSION: Final = 1
STATE_BYTES_MAX: Final = 1 << 20
GROUP_META: Final = "meshnode.cli.group_testnet"
TESTNET_META: Final = "meshnode.cli.testnet"
WHERE_META: Final = "meshnode.cli.where"
ENTRY_POINTS: Final = "meshnode.commands"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Face:
    """How this invocation talks; the root context's `obj`."""

    json: bool = False
    return_line: str = ""  # what Ctrl-C prints: the command that returns to the job


def face() -> Face:
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Face)
    return found


# ---- lazy commands


@dataclass(frozen=True, slots=True)
class Late:
    """A command that is imported when it is called; `help` is its line in the list."""

    where: str  # module:attribute
    help: str


class LateGroup(click.Group):
    def __init__(
        self, *args: Any, late: Mapping[str, Late], entry_points: str = "", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._late = dict(late)
        self._entry_points = entry_points

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._late, *sorted(self._others())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        late = self._late.get(cmd_name)
        if late is not None:
            module, _, attribute = late.where.partition(":")
            command = getattr(importlib.import_module(module), attribute)
        else:
            other = self._others().get(cmd_name)
            command = None if other is None else other.load()
        assert command is None or isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, late.help) for name, late in self._late.items()]
        rows += [(name, _PLUGIN_HELP.get(name, "")) for name in sorted(self._others())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _others(self) -> dict[str, Any]:
        if not self._entry_points:
            return {}
        from importlib.metadata import entry_points

        return {point.name: point for point in entry_points(group=self._entry_points)}


# Known without importing it; any other plug-in shows its name alone.
_PLUGIN_HELP: Final = {"testnet": "A whole mesh on this machine, for trying and testing."}


# ---- options


def json_option(command: F) -> F:
    def said(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        root = ctx.find_root().obj
        if isinstance(root, Face):
            root.json = root.json or value
        return value

    option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        expose_value=False,
        callback=said,
        help="Print one JSON object; docs/reference/json has its schema.",
    )
    return option(command)


def where() -> str:
    """The options that lead another command line to the same node."""
    return str(click.get_current_context().meta.get(WHERE_META, ""))


def home_options(command: F) -> F:
    """--home and --testnet; the command gets `home: Path`."""

    def chosen(ctx: click.Context, _: click.Parameter, value: str | None) -> Path:
        testnet = ctx.params.pop("testnet", None)
        home_said = ctx.get_parameter_source("home") is ParameterSource.COMMANDLINE
        testnet_said = ctx.get_parameter_source("testnet") is ParameterSource.COMMANDLINE
        before = ctx.meta.get(GROUP_META)  # `mesh --testnet NAME COMMAND`
        if before is not None and not testnet_said:
            testnet, testnet_said = before, True
        if home_said and testnet_said:
            raise click.UsageError("--home and --testnet exclude each other")
        if testnet is not None and not home_said:  # what is typed beats what the shell exports
            ctx.meta[TESTNET_META] = testnet
            ctx.meta[WHERE_META] = f" --testnet {testnet}" if testnet_said else ""
            return home_in_testnet(testnet)
        ctx.meta[WHERE_META] = f" --home {value}" if home_said else ""
        return Path(value).expanduser().absolute() if value else home_path()

    home = click.option(
        "--home",
        metavar="DIR",
        envvar="MESH_HOME",
        show_envvar=True,
        callback=chosen,
        help="The node's home; else the XDG data directory.",
    )
    testnet = click.option(
        "--testnet",
        metavar="NAME",
        is_eager=True,
        expose_value=True,
        envvar="MESH_TESTNET",
        show_envvar=True,
        help="Use the submitter of a running testnet.",
    )
    return testnet(home(command))


# ---- testnets: only where their state lies; what it means is theirs


def path_of_testnet(name: str) -> Path:
    """The state file of a testnet: `mesh --testnet NAME` finds its homes here."""
    if not name or not all(char.isalnum() or char in "-_." for char in name) or len(name) > 32:
        raise UsageError(f"{name!r} is no name of a testnet: use letters, digits and dashes")
    return run_base() / "testnet" / f"{name}.json"


def read_testnet(name: str) -> dict[str, Any]:
    path = path_of_testnet(name)
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(STATE_BYTES_MAX))
    except FileNotFoundError:
        raise UsageError(f"there is no testnet {name!r}; start it: mesh testnet up") from None
    except (OSError, ValueError) as error:
        raise LocalResource(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict) or "nodes" not in state:
        raise LocalResource(f"{path} is no state of a testnet")
    return state


def home_in_testnet(name: str, node: str = "submitter") -> Path:
    nodes = read_testnet(name)["nodes"]
    if node not in nodes:
        raise UsageError(f"testnet {name} has no node {node!r}; it has: {', '.join(sorted(nodes))}")
    return Path(nodes[node]["home"])


# ---- output


def talk(text: str) -> None:
    """To the person, on stderr: never part of the result."""
    click.echo(text, err=True)


def put_json(fields: Mapping[str, Any]) -> None:
    """One JSON object on stdout; ids become text."""
    body = json.dumps({"version": JSON_VERSION, **plain(fields)}, ensure_ascii=False)
    click.echo(body)


def plain(value: Any) -> Any:
    """Bytes become the text that people and commands use for them."""
    if isinstance(value, bytes | bytearray):
        return ident(bytes(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def ident(value: bytes) -> str:
    """A peer id as libp2p prints it, anything else in hex."""
    from meshnode.protocol.identity import peer_text
    from meshnode.protocol.types import PEER_BYTES, PEER_PREFIX, Peer

    if len(value) == PEER_BYTES and value.startswith(PEER_PREFIX):
        return peer_text(Peer(value))
    return value.hex()


def put_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns on stdout, as wide as they need: made for `awk` as much as for eyes."""
    texts = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[at]) for row in texts) for at in range(len(headers))]
    for row in texts:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


# ---- the end of a command


def run(group: click.Command, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status. Every expected end is one line on stderr."""
    shown = Face()
    try:
        code = group.main(
            None if argv is None else list(argv),
            prog_name=name,
            standalone_mode=False,
            obj=shown,
        )
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else name
        return _failed(shown, f"{error.format_message()} See `{context} --help`.", "UsageError", 2)
    except click.ClickException as error:
        return _failed(shown, error.format_message(), "UsageError", 2)
    except (KeyboardInterrupt, click.Abort):
        talk(shown.return_line or "stopped")
        return 130
    except ArtifactRefused as error:
        return _failed(shown, str(error), error.reason.name, error.exit_code)
    except MeshError as error:
        return _failed(shown, str(error), type(error).__name__, error.exit_code)
    except BrokenPipeError:
        # `mesh jobs | head`: nobody reads any more, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # jaxkernels stands on its own and does not import our tree; its errors have a code too.
        known = getattr(error, "exit_code", None)
        if not isinstance(known, int):
            raise
        return _failed(shown, str(error), type(error).__name__, known)
    return code if isinstance(code, int) else 0  # click gives back what `Exit` carried


def _failed(shown: Face, text: str, kind: str, code: int) -> int:
    line = " ".join(text.split())
    if shown.json:
        put_json({"accepted": False, "reason": kind, "text": line, "exit_code": code})
    talk(f"error: {line}")
    return code


def enter(group: click.Command, name: str) -> NoReturn:
    sys.exit(run(group, name))
