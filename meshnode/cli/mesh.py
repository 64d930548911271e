"""`mesh`: submit work to the mesh and look at it. The list of commands; each is its own module."""

from __future__ import annotations

from typing import NoReturn

import click

from .frame import ENTRY_POINTS, GROUP_META, Late, LateGroup, enter

_COMMANDS = {
    "init": Late("meshnode.cli.found:mesh_init", "Make this machine a submitter of a network."),
    "map": Late("meshnode.cli.work:map_inputs", "Run a kernel over many inputs and wait."),
    "submit": Late("meshnode.cli.work:submit", "Hand a job over, print its id and return."),
    "run": Late("meshnode.cli.work:run_call", "Run a kernel once and print what it gives."),
    "jobs": Late("meshnode.cli.jobs:jobs", "List the jobs of this node."),
    "show": Late("meshnode.cli.jobs:show", "Show one job: attempts, cars, why it waits."),
    "explain": Late("meshnode.cli.why:explain", "Why a job waits or went where it went."),
    "logs": Late("meshnode.cli.jobs:logs", "Show what happened to a job."),
    "result": Late("meshnode.cli.jobs:result", "Wait for a job and write its result."),
    "cancel": Late("meshnode.cli.jobs:cancel", "Stop a job."),
    "peers": Late("meshnode.cli.look:peers", "List the cars and nodes in reach."),
    "kernels": Late("meshnode.cli.look:kernels", "List the kernels there are."),
    "models": Late("meshnode.cli.look:models", "Get the weights that a kernel needs."),
    "artifact": Late("meshnode.cli.artifact:artifact", "Build, show and check your own functions."),
    "receipts": Late("meshnode.cli.receipts:receipts", "List, show and verify signed receipts."),
    "account": Late("meshnode.cli.found:account", "Sign for a car whose account key is here."),
}


@click.group(
    cls=LateGroup,
    late=_COMMANDS,
    entry_points=ENTRY_POINTS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: mesh map embed.minilm@1 corpus.txt -o vectors.npy",
)
@click.version_option(package_name="meshnode", prog_name="mesh")
@click.option("--testnet", metavar="NAME", help="Use the submitter of a running testnet.")
@click.pass_context
def mesh(ctx: click.Context, testnet: str | None) -> None:
    """Run work on parked cars.

    Results go to stdout or to the file you name, everything else to stderr. Exit codes: 0 ok,
    1 task failed or refused, 2 usage, 3 no suitable node, 4 timeout, 5 verification, 6 budget,
    7 unreachable, 8 local resource, 130 detached.
    """
    if testnet is not None:
        ctx.meta[GROUP_META] = testnet


def main() -> NoReturn:
    enter(mesh, "mesh")


if __name__ == "__main__":
    main()
