"""`python -m tests.fuzz artifacts --count N --seed S`: mutants of artifacts, each in a process.

Prints how many ended how; exit 1 if one ended in any other way than accepted, refused with a
reason, or dead alone within its wall. `seeds DIR` and `judge DIR` are the two halves that the tests
use: seeds need jax's backend, which a process that forks must not have started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SINGLE = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def write_seeds(folder: Path, which: str) -> None:
    """The corpora as files: `honest`, `forged`, or `all` with the built-in kernels."""
    from jaxkernels import registry
    from tests.artifacts import forged, honest

    folder.mkdir(parents=True, exist_ok=True)
    if which in ("honest", "all"):
        for name in honest.PROGRAMS:
            (folder / f"honest {name}").write_bytes(honest.bytes_of(name))
        for spec in registry.KERNELS:
            (folder / f"honest {spec}").write_bytes(registry.artifact_bytes(spec))
    if which in ("forged", "all"):
        for name, one in forged.FORGED.items():
            content = one.make()
            if which == "forged" or 64 <= len(content) <= 64 << 10:
                (folder / f"forged {name.replace('/', ' ')}").write_bytes(content)


def judge(folder: Path, wall_s: float, compiled: bool) -> int:
    """One line of JSON a file, for the tests."""
    from . import forks

    forks.ready()
    outcomes = forks.judge_folder(folder, wall_s=wall_s, compiled=compiled)
    print(json.dumps({name: outcome._asdict() for name, outcome in outcomes.items()}))
    return 0 if all(outcome.fine for outcome in outcomes.values()) else 1


def artifacts(options: argparse.Namespace) -> int:
    from . import artifacts as mutants
    from . import forks

    with tempfile.TemporaryDirectory(prefix="meshnode-fuzz-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tests.fuzz", "seeds", str(folder), "--which"]
        command.append(options.which)
        subprocess.run(command, check=True)
        seeds = mutants.seeds_of(folder)
    forks.ready()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    found = mutants.fuzz(
        seeds, options.count, options.seed, compiled=options.compile, keep=options.keep
    )
    for outcome, times in found.most_common():
        print(f"{times:8} {outcome}")
    return 1 if found["not fine"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    fuzz = what.add_parser("artifacts", help="mutate and judge")
    fuzz.add_argument("--count", type=int, default=20_000)
    fuzz.add_argument("--seed", type=int, default=1)
    fuzz.add_argument("--which", choices=("honest", "forged", "all"), default="all")
    fuzz.add_argument("--compile", action="store_true", help="have XLA compile what is accepted")
    fuzz.add_argument("--keep", type=Path, help="folder for the bytes of mutants that killed")
    seeds = what.add_parser("seeds", help="write the corpora")
    seeds.add_argument("folder", type=Path)
    seeds.add_argument("--which", choices=("honest", "forged", "all"), default="all")
    one = what.add_parser("judge", help="judge the files of a folder")
    one.add_argument("folder", type=Path)
    one.add_argument("--wall-s", type=float, default=10.0)
    one.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.what == "seeds":
        write_seeds(options.folder, options.which)
        return 0
    if options.what == "judge":
        return judge(options.folder, options.wall_s, options.compile)
    return artifacts(options)


if __name__ == "__main__":
    if any(os.environ.get(name) != "1" for name in SINGLE):
        # NumPy's own threads start at import, and a process that forks must have one.
        os.environ.update(dict.fromkeys(SINGLE, "1"))
        os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])
    sys.exit(main())
