"""`mesh map|submit|run`: read inputs, hand a job to the node, and, unless detached, wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from meshnode.errors import Refused, UsageError

from . import frame
from .inputs import load_model, read_cars, read_inputs, read_options
from .jobs import OUT
from .reach import connected
from .watching import check_out, follow, put_result, put_value, return_line

if TYPE_CHECKING:
    from jaxkernels.host import Prepared
    from jaxkernels.spec import KernelInfo
    from meshnode.client import Terms

F = TypeVar("F", bound=Callable[..., Any])

KERNEL = click.argument("kernel", metavar="KERNEL")
INPUTS = click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")


def work_options(command: F) -> F:
    """What all three say of how a job is to run."""
    for option in (
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="An option of the kernel.",
        ),
        click.option(
            "--policy",
            type=click.Choice(["adverts", "gossip"]),
            default="adverts",
            show_default=True,
            help="Offer to known cars first, or always announce in the cell.",
        ),
        click.option(
            "--cars",
            multiple=True,
            metavar="CARS",
            help="Only these: peer ids, or names of a testnet's cars; any for all.",
        ),
        click.option(
            "--deadline",
            "deadline_s",
            type=click.FloatRange(min=0),
            default=0.0,
            metavar="S",
            help="The job fails if it is not done within so long (exit code 4).",
        ),
        click.option("--label", default="", metavar="TEXT", help="Your own word for the job."),
        click.option(
            "--join",
            multiple=True,
            metavar="ADDR",
            envvar="MESH_JOIN",
            show_envvar=True,
            help="Multiaddr of a node to meet the network by; when the node is started.",
        ),
        click.option(
            "--genesis",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Make the home for this network first, if there is none.",
        ),
        click.option("--allow-test", is_flag=True, help="With --genesis: also a test network."),
    ):
        command = option(command)
    return command


class Asked:
    """What a command line asks for, checked before anything leaves."""

    def __init__(self, given: dict[str, Any]) -> None:
        from jaxkernels import registry

        self.home: Path = given["home"]
        self.join: tuple[str, ...] = given["join"]
        self.given = given
        name: str = given["kernel"]
        if name.endswith(".mesh") or Path(name).is_file():
            raise Refused(f"{name}: only built-in kernels run for now; see `mesh kernels`")
        self.info: KernelInfo = registry.get(name)
        self.options = read_options(self.info, given["settings"])
        self.cars = read_cars(given["cars"], _testnet())
        self._make_home()

    def _make_home(self) -> None:
        """--genesis: so that one line on a fresh machine is enough."""
        genesis: Path | None = self.given["genesis"]
        if genesis is None or (self.home / "genesis.mesh").exists():
            return
        from .found import make_submitter

        make_submitter(self.home, genesis, self.given["allow_test"], None)

    def prepare(self) -> Prepared:
        from jaxkernels import host

        inputs = read_inputs(self.given["inputs"])
        prepared = host.prepare(self.info.spec, inputs, self.options, load_model(self.info))
        cut = prepared.context.get("cut")
        if cut:
            frame.talk(f"{cut} inputs were too long and are cut; see `mesh kernels --json`")
        return prepared

    def terms(self, *, durable: bool = True) -> Terms:
        from meshnode.client import Terms
        from meshnode.protocol.types import Peer

        return Terms(
            policy=self.given["policy"],
            cars=tuple(Peer(car) for car in self.cars),
            deadline_s=self.given["deadline_s"],
            durable=durable,
            label=self.given["label"],
        )


def _testnet() -> str | None:
    """The name that --testnet had; `home_options` has made a home of it already."""
    found = click.get_current_context().meta.get(frame.TESTNET_META)
    return None if found is None else str(found)


@click.command("map", epilog="Example: mesh map embed.minilm@1 corpus.txt -o vectors.npy")
@KERNEL
@INPUTS
@OUT
@click.option("--detach", is_flag=True, help="Print the job's id and return at once.")
@work_options
@frame.home_options
@frame.json_option
def map_inputs(out: Path | None, detach: bool, **given: Any) -> None:
    """Run a kernel over many inputs on the cars of the mesh, and wait for the result.

    KERNEL is a name of `mesh kernels`. INPUT is a file (.txt: an input per line, .jsonl, .npy), a
    number, or NAME=FILE where the kernel takes several. Ctrl-C leaves the job running and prints
    the command that returns to it.
    """
    check_out(out)
    asked = Asked(given)
    prepared = asked.prepare()
    with connected(asked.home, asked.join) as mesh:
        job_id = mesh.submit(asked.info, prepared, terms=asked.terms())
        if detach:
            _handed_over(job_id, prepared.units, out)
            return
        # before the job is named: who reads its name may press Ctrl-C at once
        frame.face().return_line = return_line("mesh result", job_id, out)
        frame.talk(f"job {job_id.hex()[:8]}: {prepared.units} units of {asked.info.spec}")
        follow(mesh, job_id, "mesh result", out, None)
        put_result(mesh, job_id, out)


@click.command(epilog="Example: mesh submit embed.minilm@1 corpus.txt --label topics")
@KERNEL
@INPUTS
@work_options
@frame.home_options
@frame.json_option
def submit(**given: Any) -> None:
    """Hand a job over, print its id and return.

    The node keeps the job through crashes; `mesh result JOB -o FILE` waits for it.
    """
    asked = Asked(given)
    prepared = asked.prepare()
    with connected(asked.home, asked.join) as mesh:
        job_id = mesh.submit(asked.info, prepared, terms=asked.terms())
    _handed_over(job_id, prepared.units, None)


def _handed_over(job_id: bytes, units: int, out: Path | None) -> None:
    if frame.face().json:
        frame.put_json({"job_id": job_id, "units": units, "state": "running"})
    else:
        click.echo(job_id.hex())
    frame.talk(return_line("mesh result", job_id, out))


@click.command("run", epilog="Example: mesh run bench.spin@1 1 --set ms=10")
@KERNEL
@INPUTS
@OUT
@click.option("--detach", is_flag=True, help="Hand it over as a job, print its id and return.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Wait at most so long.")
@work_options
@frame.home_options
@frame.json_option
def run_call(out: Path | None, detach: bool, timeout_s: float | None, **given: Any) -> None:
    """Run a kernel once, with the least delay, and print what it gives.

    Nothing is kept on disk: if your node dies the call is lost. For many inputs use `mesh map`.
    """
    if detach and (timeout_s is not None or out is not None):
        raise UsageError("--detach returns at once: there is nothing to wait for or to write")
    check_out(out)
    asked = Asked(given)
    prepared = asked.prepare()
    with connected(asked.home, asked.join) as mesh:
        if detach:
            _handed_over(
                mesh.submit(asked.info, prepared, terms=asked.terms()), prepared.units, out
            )
            return
        from jaxkernels import host

        terms = asked.terms(durable=False)
        arrays = mesh.call(asked.info, prepared, terms=terms, timeout_s=timeout_s)
        value = host.finish(asked.info.spec, arrays, prepared.context)
    fields = {"job_id": None, "state": "done", "units": prepared.units}
    put_value(value, out, fields, asked.info.spec)
