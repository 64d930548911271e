"""`mesh map|submit|run`: read inputs, hand a job to the node, and, unless detached, wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from meshnode.errors import UsageError

from . import frame
from .inputs import load_model, read_cars, read_inputs, read_options
from .jobs import OUT
from .reach import connected
from .watching import check_out, finished_text, follow, put_result, put_value, return_line

if TYPE_CHECKING:
    from jaxkernels.host import Prepared
    from jaxkernels.spec import KernelInfo
    from meshnode.client import Foreign, Mesh, Terms

F = TypeVar("F", bound=Callable[..., Any])

KERNEL = click.argument("kernel", metavar="KERNEL")
INPUTS = click.argument("inputs", nargs=-1, metavar="[INPUT...]")


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
            type=click.Choice(["tokens", "adverts", "gossip"]),
            default="tokens",
            show_default=True,
            help="Ask the cell's rendezvous for idle cars, offer to known ones, or announce.",
        ),
        click.option(
            "--cars",
            multiple=True,
            metavar="CARS",
            help="Only these: mine, fleet, an account, peer ids, names of a testnet's cars; any.",
        ),
        click.option(
            "--deadline",
            "deadline_s",
            type=click.FloatRange(min=0),
            default=0.0,
            metavar="S",
            help="The job fails if it is not done within so long (exit code 4).",
        ),
        click.option(
            "--steps",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="Of each unit of a stepped kernel; else what its input asks for.",
        ),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Submit nothing: say which cars would be asked, why the others not, and what a "
            "unit costs. Exit code 3 if none would.",
        ),
        click.option("--prompt", metavar="TEXT", help="The input of a kernel that takes text."),
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
        self.home: Path = given["home"]
        self.join: tuple[str, ...] = given["join"]
        self.given = given
        self.foreign: Foreign | None = None
        self.info: KernelInfo | None = None
        name: str = given["kernel"]
        if name.endswith(".mesh") or Path(name).is_file():
            self.foreign = self._bundle(Path(name))
            if given["settings"]:
                raise UsageError("--set is for built-in kernels")
        else:
            from jaxkernels import registry

            self.info = registry.get(name)
            self.options = read_options(self.info, given["settings"])
        if given["steps"] and not self.stepped:
            raise UsageError(f"{self.name} has no steps")
        self.cars, self.owners = read_cars(given["cars"], _testnet())
        self._make_home()

    @staticmethod
    def _bundle(path: Path) -> Foreign:
        from meshnode.client import Foreign
        from meshnode.errors import ArtifactRefused, RemoteProtocolError
        from meshnode.protocol.reasons import Reason

        if not path.is_file():
            raise UsageError(f"there is no file {path}; `mesh artifact build` makes one")
        try:
            return Foreign.of_bundle(path)
        except RemoteProtocolError as error:
            text = f"{path} is no bundle of `mesh artifact build`: {error}"
            raise ArtifactRefused(Reason.ARTIFACT_FORMAT, text) from None

    def _make_home(self) -> None:
        """--genesis: so that one line on a fresh machine is enough."""
        genesis: Path | None = self.given["genesis"]
        if genesis is None or (self.home / "genesis.mesh").exists():
            return
        from .found import make_submitter

        make_submitter(self.home, genesis, self.given["allow_test"], None)

    @property
    def name(self) -> str:
        if self.foreign is not None:
            return self.foreign.name
        assert self.info is not None
        return self.info.spec

    @property
    def stepped(self) -> bool:
        program: Any = self.foreign or self.info
        return program.stepped is not None

    def prepare(self) -> Prepared:
        prompt = self.given.get("prompt")
        if (prompt is None) == (not self.given["inputs"]):
            raise UsageError("give INPUT, or --prompt for a kernel that takes text; one of them")
        inputs = read_inputs(self.given["inputs"]) if prompt is None else prompt
        if self.foreign is not None:
            return self._prepare_foreign(self.foreign, inputs)
        from jaxkernels import host

        assert self.info is not None
        prepared = host.prepare(self.info.spec, inputs, self.options, load_model(self.info))
        cut = prepared.context.get("cut")
        if cut:
            frame.talk(f"{cut} inputs were too long and are cut; see `mesh kernels --json`")
        return prepared

    @staticmethod
    def _prepare_foreign(foreign: Foreign, inputs: Any) -> Prepared:
        """One plain array, or arg0=FILE arg1=FILE ... in calling order."""
        from meshnode.client.programs import prepare

        if not isinstance(inputs, dict):
            return prepare(foreign, [inputs])
        names = [f"arg{number}" for number in range(len(foreign.args))]
        if sorted(inputs) != sorted(names):
            raise UsageError(f"{foreign.name} takes {', '.join(f'{n}=FILE' for n in names)}")
        return prepare(foreign, [inputs[name] for name in names])

    def terms(self, *, durable: bool = True) -> Terms:
        from meshnode.client import Terms
        from meshnode.protocol.types import Peer

        return Terms(
            policy=self.given["policy"],
            cars=tuple(Peer(car) for car in self.cars),
            owners=self.owners,
            deadline_s=self.given["deadline_s"],
            durable=durable,
            label=self.given["label"],
            steps=self.given["steps"],
        )

    def submit(self, mesh: Mesh, prepared: Prepared) -> bytes:
        """As a durable job; its id."""
        if self.foreign is not None:
            return mesh.submit_foreign(self.foreign, prepared, terms=self.terms()).job_id
        assert self.info is not None
        return mesh.submit_kernel(self.info, prepared, terms=self.terms())

    def dry_run(self, mesh: Mesh, prepared: Prepared) -> None:
        """--dry-run: what `submit` would do now."""
        from .why import put_would

        program = self.foreign or self.info
        assert program is not None
        put_would(mesh.would(program, prepared, terms=self.terms()))

    def call(self, mesh: Mesh, prepared: Prepared, timeout_s: float | None) -> Any:
        """As one call, nothing kept; its result as the person wants it."""
        from meshnode.client.orders import Note, finish

        terms = self.terms(durable=False)
        if self.foreign is not None:
            arrays = mesh.call_foreign(self.foreign, prepared, terms=terms, timeout_s=timeout_s)
        else:
            assert self.info is not None
            arrays = mesh.call(self.info, prepared, terms=terms, timeout_s=timeout_s)
        return finish(Note(self.name, dict(prepared.context)), arrays)


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

    KERNEL is a name of `mesh kernels`, or a file x.mesh of `mesh artifact build`. INPUT is a file
    (.txt: an input per line, .jsonl, .npy), a number, or NAME=FILE where the kernel takes several
    (arg0=FILE arg1=FILE of a file x.mesh). Ctrl-C leaves the job running and prints the command
    that returns to it.
    """
    check_out(out)
    asked = Asked(given)
    prepared = asked.prepare()
    with connected(asked.home, asked.join) as mesh:
        if given["dry_run"]:
            asked.dry_run(mesh, prepared)
            return
        job_id = asked.submit(mesh, prepared)
        if detach:
            _handed_over(job_id, prepared.units, out)
            return
        # before the job is named: who reads its name may press Ctrl-C at once
        frame.face().return_line = return_line("mesh result", job_id, out)
        frame.talk(f"job {job_id.hex()[:8]}: {prepared.units} units of {asked.name}")
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
        if given["dry_run"]:
            asked.dry_run(mesh, prepared)
            return
        job_id = asked.submit(mesh, prepared)
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

    Nothing is kept on disk: if your node dies the call is lost. For many inputs use `mesh map`. A
    stepped kernel is a long job, which is kept: what it has is printed as it goes on, and if its
    car leaves another one goes on from its checkpoint.
    """
    if detach and (timeout_s is not None or out is not None):
        raise UsageError("--detach returns at once: there is nothing to wait for or to write")
    check_out(out)
    asked = Asked(given)
    prepared = asked.prepare()
    with connected(asked.home, asked.join) as mesh:
        if given["dry_run"]:
            asked.dry_run(mesh, prepared)
        elif detach:
            _handed_over(asked.submit(mesh, prepared), prepared.units, out)
        elif asked.stepped:
            _run_long(mesh, asked, prepared, out, timeout_s)
        else:
            value = asked.call(mesh, prepared, timeout_s)
            fields = {"job_id": None, "state": "done", "units": prepared.units}
            put_value(value, out, fields, asked.name)


def _run_long(
    mesh: Mesh, asked: Asked, prepared: Prepared, out: Path | None, timeout_s: float | None
) -> None:
    """A long job survives its cars and this command; it shows what it has as it goes on."""
    from .streaming import Streamed, stream

    job_id = asked.submit(mesh, prepared)
    frame.face().return_line = return_line("mesh result", job_id, out)
    frame.talk(f"job {job_id.hex()[:8]}: {prepared.units} units of {asked.name}")
    shows = asked.info is not None and prepared.units == 1 and out is None
    if timeout_s is not None or frame.face().json or not shows:
        follow(mesh, job_id, "mesh result", out, timeout_s)
        put_result(mesh, job_id, out)
        return
    assert asked.info is not None
    shown = Streamed(asked.info, prepared.context)
    stream(mesh, job_id, shown)
    if not shown.text:
        put_result(mesh, job_id, out)
        return
    whole = finished_text(mesh, job_id)
    click.echo(whole[len(shown.text) :] if whole.startswith(shown.text) else f"\n{whole}")
