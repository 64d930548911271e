"""`python -m jaxkernels.build [--check]`: the committed artifacts, rebuilt or compared. Needs jax.

Flow: `make kernels` runs it after a kernel or the pinned jax changes. Same source and same jax give
the same bytes from any folder; `--check` exits 1 and names each kernel whose bytes would change.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from . import registry
from .export import PLATFORMS, STABLEHLO_VERSION, export_kernel
from .spec import ArraySpec, KernelInfo


def build_kernel(info: KernelInfo) -> bytes:
    module = importlib.import_module(f"{__package__}.{info.package}.kernel")
    return export_kernel(info, module.kernel)


def describe(info: KernelInfo, content: bytes) -> dict[str, Any]:
    """The kernel's row in the digest list: what its bytes take and give."""

    def row(spec: ArraySpec) -> dict[str, Any]:
        return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}

    return {
        "file": f"{info.spec}.bin",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "args": [row(arg) | {"mapped": arg.mapped} for arg in info.artifact_args],
        "outs": [row(out) for out in info.artifact_outs],
    } | ({"stepped": True} if info.stepped else {})


def build_all() -> tuple[dict[str, Any], dict[str, bytes]]:
    """The digest list and the bytes of every registered kernel."""
    contents = {spec: build_kernel(info) for spec, info in sorted(registry.KERNELS.items())}
    digests = {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "stablehlo": STABLEHLO_VERSION,
        "platforms": list(PLATFORMS),
        "kernels": {
            spec: describe(registry.get(spec), content) for spec, content in contents.items()
        },
    }
    return digests, contents


def write(folder: Path, digests: dict[str, Any], contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for spec, content in contents.items():
        (folder / digests["kernels"][spec]["file"]).write_bytes(content)
    (folder / registry.DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n")


def drift(folder: Path, digests: dict[str, Any], contents: dict[str, bytes]) -> list[str]:
    """One line for each difference between what is committed and what would be built."""
    try:
        committed = json.loads((folder / registry.DIGESTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        return [f"{registry.DIGESTS_FILE}: {error}"]
    lines = [
        f"{key}: committed {committed.get(key)}, here {digests[key]}"
        for key in ("jax", "jaxlib", "stablehlo", "platforms")
        if committed.get(key) != digests[key]
    ]
    rows = committed.get("kernels", {})
    for spec in sorted(set(rows) | set(contents)):
        if spec not in rows or spec not in contents:
            where = "committed" if spec in rows else "registered"
            lines.append(f"{spec}: only {where}")
            continue
        if rows[spec] != digests["kernels"][spec]:
            here = digests["kernels"][spec]["sha256"][:12]
            lines.append(f"{spec}: listed {rows[spec].get('sha256', '')[:12]}, built {here}")
        path = folder / digests["kernels"][spec]["file"]
        if not path.is_file() or path.read_bytes() != contents[spec]:
            lines.append(f"{spec}: {path.name} is not what its source builds")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxkernels.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="report drift, write nothing")
    parser.add_argument("--out", type=Path, default=registry.artifact_folder(), help="where to")
    options = parser.parse_args(argv)
    digests, contents = build_all()
    if options.check:
        lines = drift(options.out, digests, contents)
        for line in lines:
            print(line)
        print(f"{len(contents)} kernels: {'drift' if lines else 'as committed'}", file=sys.stderr)
        return 1 if lines else 0
    write(options.out, digests, contents)
    for spec, row in digests["kernels"].items():
        print(f"{spec:18} {row['size_bytes']:7} B  {row['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
