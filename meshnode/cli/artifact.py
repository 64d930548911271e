"""`mesh artifact build|show|check`: a function of one's own as a file that cars can run.

`build` exports in a child process and signs the manifest with the home's key; `show` reads the
manifest and loads no jax; `check` has the validator judge a file in a process that may die of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from meshnode.errors import ArtifactRefused, LocalResource, UsageError

from . import frame
from .found import now_ms

if TYPE_CHECKING:
    from meshnode.artifact.bundle import Terms
    from meshnode.protocol.identity import KeySigner
    from meshnode.protocol.objects import ArgRole, Manifest
    from meshnode.protocol.types import ArraySpec

NUMERICS: Final = ("exact", "f32-highest", "tf32", "bf16")
ROLES: Final = {"const": "CONSTANT", "mapped": "MAPPED", "state": "STATE"}


@click.group(epilog="Example: mesh artifact check a.mesh")
def artifact() -> None:
    """Functions of your own as files that cars can run."""


# ---- build


@artifact.command(
    epilog="Example: mesh artifact build pkg.mod:fn --spec 'f32[64,128]' -o a.mesh",
)
@click.argument("target", metavar="PKG.MOD:FN")
@click.option(
    "--spec",
    "specs",
    multiple=True,
    metavar="[ROLE=]SPEC",
    help="One argument, in order: 'f32[64,128]', or 'const=f32[128]' for one that is the same for "
    "every unit, or 'state=f32[64]' for one that a step returns. Once per argument.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE")
@click.option("--name", metavar="NAME", help="What people call it; else the target.")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Stepped: steps of one unit.")
@click.option(
    "--slice",
    "slice_steps",
    type=click.IntRange(1),
    metavar="N",
    help="Stepped: how many steps take about half a second.",
)
@click.option(
    "--result",
    multiple=True,
    type=click.IntRange(0, 63),
    metavar="I",
    help="Stepped: state arrays that are the unit's result; else all.",
)
@click.option(
    "--watch",
    multiple=True,
    type=click.IntRange(0, 63),
    metavar="I",
    help="Stepped: state arrays to be seen as it goes on.",
)
@click.option("--numerics", type=click.Choice(NUMERICS), default="f32-highest", show_default=True)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    metavar="REL",
    help="How far honest cars may differ, of the largest output; else the class's own.",
)
@click.option("--wall-s", type=click.FloatRange(0.001), metavar="S", help="Longest time of a unit.")
@click.option("--memory-mb", type=click.IntRange(1), metavar="MB", help="Most memory of a unit.")
@click.option("--x64/--no-x64", default=None, help="64-bit mode; else on if an argument has 64.")
@frame.home_options
@frame.json_option
def build(target: str, specs: tuple[str, ...], out: Path, home: Path, **options: Any) -> None:
    """Export a JAX function for cpu, cuda and tpu and write it with a signed manifest.

    PKG.MOD:FN is imported from the current directory, in a process of its own. The function takes
    arrays, one after another, and returns arrays; weights are arguments (const=), not constants. A
    stepped function is step(constants..., state..., n) -> state...; n, an int32, has no --spec.
    """
    from meshnode.artifact.building import build_in_child
    from meshnode.artifact.bundle import make_manifest, write_bundle
    from meshnode.node.firstrun import read_network
    from meshnode.protocol.types import STEP_COUNT

    if ":" not in target:
        raise UsageError(f"{target!r} names no function; write PKG.MOD:FN")
    network = read_network(home).ident
    signer, maker = _maker(home)
    args = [_argument(text) for text in specs]
    terms = _terms(target, args, options)
    shapes = [spec for _, spec in args]
    if terms.steps is not None:
        shapes.append(STEP_COUNT)
    exported, content = build_in_child(target, shapes, Path.cwd(), x64=options["x64"])
    manifest = make_manifest(content, exported, terms, network, maker, now_ms())
    wire = write_bundle(manifest, content, signer)
    try:
        out.write_bytes(wire)
    except OSError as error:
        raise LocalResource(f"{out} cannot be written: {error.strerror}") from None
    if frame.face().json:
        frame.put_json({"file": out, **_fields(manifest)})
    else:
        frame.talk(f"{out}: {len(wire)} bytes")
        click.echo(manifest.artifact.hex())


def _maker(home: Path) -> tuple[KeySigner, bytes]:
    """The account's key where it is here, else this node's."""
    from meshnode.node import keystore

    signer = keystore.find(home, keystore.ACCOUNT)
    if signer is not None:
        return signer, signer.account
    signer = keystore.load(home, keystore.NODE)
    return signer, signer.peer


def _argument(text: str) -> tuple[ArgRole, ArraySpec]:
    from meshnode.artifact.specs import parse_spec
    from meshnode.protocol.objects import ArgRole

    role, sign, spec = text.rpartition("=")
    if sign and role not in ROLES:
        raise UsageError(f"--spec {text}: a role is one of {', '.join(ROLES)}")
    return ArgRole[ROLES[role or "mapped"]], parse_spec(spec)


def _terms(target: str, args: list[tuple[ArgRole, ArraySpec]], options: dict[str, Any]) -> Terms:
    from meshnode.artifact.bundle import Terms
    from meshnode.protocol.objects import ArgRole, Numerics, Steps

    states = sum(role is ArgRole.STATE for role, _ in args)
    stepped = ("steps", "slice_steps", "result", "watch")
    if not states and any(options[name] for name in stepped):
        raise UsageError("--steps, --slice, --result and --watch are for arguments of role state=")
    steps = None
    if states:
        unit = options["steps"] or 100
        result = tuple(sorted(set(options["result"]))) or tuple(range(states))
        watch = tuple(sorted(set(options["watch"])))
        steps = Steps(result, watch, unit, options["slice_steps"] or max(1, unit // 10))
    tolerance = options["tolerance"]
    return Terms(
        name=options["name"] or target,
        roles=tuple(role for role, _ in args),
        numerics=Numerics(NUMERICS.index(options["numerics"])),
        tolerance_nano=None if tolerance is None else round(tolerance * 1e9),
        unit_wall_ms_max=round((options["wall_s"] or 0) * 1000),
        memory_mb_max=options["memory_mb"] or 0,
        steps=steps,
    )


# ---- show and check


def _read(path: Path) -> bytes:
    """A file's bytes, no more than a bundle may have and one."""
    from meshnode.artifact.bundle import BUNDLE_BYTES_MAX

    try:
        with path.open("rb") as file:
            return file.read(BUNDLE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise LocalResource(f"{path} cannot be read: {error.strerror}") from None


def _fields(manifest: Manifest) -> dict[str, Any]:
    from meshnode.artifact.specs import spec_text

    steps = manifest.steps
    return {
        "name": manifest.name,
        "artifact": manifest.artifact,
        "size": manifest.size,
        "maker": manifest.maker,
        "network": manifest.network,
        "args": [{"role": a.role.name.lower(), "spec": spec_text(a.spec)} for a in manifest.args],
        "outs": [spec_text(spec) for spec in manifest.outs],
        "x64": bool(manifest.x64),
        "numerics": NUMERICS[manifest.numerics],
        "tolerance_nano": manifest.tolerance_nano,
        "unit_wall_ms_max": manifest.unit_wall_ms_max,
        "memory_mb_max": manifest.memory_mb_max,
        "result_bytes_max": manifest.result_bytes_max,
        "jax": manifest.jax,
        "calling_convention": manifest.calling_convention,
        "platforms": list(manifest.platforms),
        "made_ms": manifest.made_ms,
        "steps": None if steps is None else steps._asdict(),
    }


@artifact.command(epilog="Example: mesh artifact show a.mesh")
@click.argument("file", type=click.Path(path_type=Path))
@frame.json_option
def show(file: Path) -> None:
    """Show what a bundle's maker signed: arguments, results, limits.

    The signature and the digest are checked; whether cars would run it, `mesh artifact check` says.
    """
    from meshnode.artifact.bundle import is_bundle, read_bundle
    from meshnode.errors import RemoteProtocolError
    from meshnode.protocol.reasons import Reason

    wire = _read(file)
    if not is_bundle(wire):
        text = f"{file} is no bundle; `mesh artifact check {file}` tells what it is"
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text)
    try:
        fields = _fields(read_bundle(wire).manifest)
    except RemoteProtocolError as error:
        raise ArtifactRefused(Reason.ARTIFACT_FORMAT, f"{file} is damaged: {error}") from None
    if frame.face().json:
        frame.put_json(fields)
        return
    fields["args"] = ", ".join(f"{arg['role']} {arg['spec']}" for arg in fields["args"])
    for name in ("outs", "platforms"):
        fields[name] = ", ".join(fields[name])
    for name, value in frame.plain(fields).items():
        if value is not None:
            click.echo(f"{name:<18} {value}")


@artifact.command(epilog="Example: mesh artifact check a.mesh --json")
@click.argument("file", type=click.Path(path_type=Path))
@frame.json_option
def check(file: Path) -> None:
    """Say whether cars would run a bundle or bare jax.export bytes, and why not (exit code 1).

    The file is judged by the validator of the cars, in a confined process with a wall clock: a
    crash or a hang of the parser is a refusal too.
    """
    from meshnode.artifact.checking import check_bytes

    wire = _read(file)
    verdict = check_bytes(wire, builtin=_of_the_release(wire))
    code = 0 if verdict.accepted else ArtifactRefused.exit_code
    if frame.face().json:
        figures = verdict.figures or {}
        manifest = verdict.manifest
        frame.put_json(
            {
                "accepted": verdict.accepted,
                "reason": verdict.reason,
                "text": verdict.text,
                "exit_code": code,
                "name": None if manifest is None else manifest.name,
                **{k: figures.get(k) for k in ("operations", "flop", "bytes", "unbounded")},
            }
        )
    elif verdict.accepted:
        assert verdict.figures is not None
        figures = verdict.figures
        stepped = verdict.manifest is not None and verdict.manifest.steps is not None
        flop = f"{figures['flop']} FLOP" + (" a step" if stepped else "")
        if figures["unbounded"]:
            flop += ", and more as its loops run on: receipts state none"
        click.echo(f"accepted: {figures['operations']} operations, {flop}")
    else:
        click.echo(f"refused: {verdict.reason}: {verdict.text}")
    if code:
        raise click.exceptions.Exit(code)


def _of_the_release(wire: bytes) -> bool:
    """Whether these are the bytes of one of this release's own kernels."""
    import hashlib

    from jaxkernels import registry

    return registry.by_digest(hashlib.sha256(wire).digest()) is not None
