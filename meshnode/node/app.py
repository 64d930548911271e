"""A whole node in one scope: opens every part, wires them to the machine, and closes them again.

    open_node:  lock + journal > restore > blobs > overlay > executor > driver > control socket
    serve:      the process around it: signals, ready line, drain, one clear line when it fails

Parts open from the left and close from the right: what is promised last is taken back first, and
the journal has written everything before the home's lock goes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio

from meshnode.config import NodeConfig
from meshnode.errors import LocalResource, MeshError
from meshnode.executor import Executor, ExecutorConfig, NodeArtifacts, open_executor
from meshnode.ledger.blobs import BlobStore
from meshnode.ledger.journal import open_journal
from meshnode.ledger.load import load
from meshnode.overlay import Overlay, OverlayConfig, open_overlay
from meshnode.protocol.acceptances import NoAudit
from meshnode.protocol.events import AddrsKnown, Drain, MandateRenewed, TermsChanged
from meshnode.protocol.identity import peer_text
from meshnode.protocol.narrowing import policy_in_effect
from meshnode.protocol.node import Node
from meshnode.protocol.outbox import Identity
from meshnode.protocol.papers import T_CONSENT, Consent, Policy
from meshnode.protocol.placement import AdvertPlacement
from meshnode.protocol.reasons import Reason
from meshnode.protocol.sealed import unseal

from . import keystore
from .bulletin import Bulletin
from .clock import Clock, SystemClock
from .control import open_control
from .diary import Diary
from .driver import Driver
from .energy_book import EnergyBook
from .firstrun import load_identity, read_network, renew_mandate
from .home import blobs_path, check_home, executables_path, run_dir, socket_path
from .metering import Metering, open_metering
from .mode import read_mode
from .peerstore import Peerstore, read_peerstore
from .running import TMP_NAME, RunningNode
from .sleeping import Sleeper
from .uplink import Uplink
from .vehicle_watch import VehicleWatch, open_vehicle
from .wire import SOCKET_NAME

DRAIN_POLL_S: Final = 0.05
IDLE_POLL_S: Final = 1.0
RENEW_LOOK_S: Final = 3_600.0  # a mandate is made anew two days before it runs out
CLOSE_S_MAX: Final = 10.0
"""From the end of draining to the end of the process; then it ends the hard way."""
SWITCH_S: Final = 0.000_2

log = logging.getLogger("meshnode.node")


@contextmanager
def _quick_switches() -> Iterator[None]:
    """The journal's thread gives the interpreter back soon. With Python's default of 5 ms a commit
    that fell into a call made it 5 ms longer: warm calls had a median of 4.5 ms instead of 2."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@asynccontextmanager
async def open_node(home: Path, config: NodeConfig) -> AsyncIterator[RunningNode]:
    """The node of `home`, running, with its control socket."""
    check_home(home)
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        stack.enter_context(_quick_switches())
        journal = await stack.enter_async_context(
            open_journal(home, jobs_bytes_max=config.storage.jobs_bytes_max)
        )
        journal.prune(clock.now().unix_ms - int(config.storage.keep_jobs_s * 1000))
        identity = load_identity(home, cell=config.node.cell, now_ms=clock.now().unix_ms)
        restored = await trio.to_thread.run_sync(load, home, clock.now().unix_ms)
        blobs = await trio.to_thread.run_sync(_open_blobs, home, config)
        overlay = await stack.enter_async_context(open_overlay(_overlay(home, config), blobs))
        policy = _policy_of(identity)
        metering = await _open_metering(stack, config, policy)
        executor = await _open_executor(stack, home, config, blobs, policy, metering)
        machine = Node(
            identity,
            config.limits,
            keystore.load(home, keystore.NODE),
            AdvertPlacement(),
            NoAudit(),
            random.Random(os.urandom(16)),
            restored,
        )
        bulletin = Bulletin()
        peerstore = Peerstore(home, lambda: overlay.met, overlay.remember)
        overlay.on_met = peerstore.changed
        stack.enter_context(bulletin.subscribed(b"", peerstore.heard))
        driver = Driver(
            machine,
            overlay,
            executor,
            journal,
            blobs,
            bulletin,
            clock,
            fetches_max=config.storage.fetches_max,
        )
        node = RunningNode(
            home, config, machine, driver, bulletin, blobs, clock, tuple(overlay.addrs)
        )
        driver.on_fetched = node.blob_fetched
        sleeper = Sleeper(
            config.vehicle.sleep_command, machine.standby.still, driver.post, driver.counters
        )
        driver.on_sleep = sleeper.fall
        node.adopt(restored.jobs)
        nursery = await stack.enter_async_context(_closing_nursery())
        nursery.start_soon(driver.run)
        await driver.started.wait()
        driver.post(AddrsKnown(tuple(overlay.addrs)))
        _store_papers(driver, identity)
        nursery.start_soon(node.tell_blobs_held)
        nursery.start_soon(peerstore.run)
        nursery.start_soon(sleeper.run)
        nursery.start_soon(renew_mandate_in_time, home, machine, driver, clock)
        if executor is not None:
            node.worker_pids = executor.worker_pids
            node.word.on_policy = partial(use_policy, executor)
            executor.probe()
        if executor is not None and identity.policy is not None and metering is not None:
            # Without a policy there is nothing to spend, and the machine says why.
            uplink = Uplink(config.node.link, lambda: moved_bytes(overlay))
            await stack.enter_async_context(_minding(node, nursery, identity, metering, uplink))
            assert node.vehicle is not None
            sleeper.on_awake = node.vehicle.weigh
        await stack.enter_async_context(open_control(node, socket_path(home, SOCKET_NAME)))
        yield node


@asynccontextmanager
async def _minding(
    node: RunningNode,
    nursery: trio.Nursery,
    identity: Identity,
    metering: Metering,
    uplink: Uplink,
) -> AsyncIterator[None]:
    """The car's readings, its energy and the owner's mode, from here on in every budget."""
    settings, clock = node.config.vehicle, node.clock
    policy, consent = _policy_of(identity), identity.consent
    assert policy is not None
    book = EnergyBook(node.home, node.drawn, Diary(node.home))
    watch = VehicleWatch(
        open_vehicle(settings, node.home, simulated=read_network(node.home).is_test),
        policy,
        clock,
        node.driver.post,
        poll_s=settings.poll_s,
        mode=read_mode(node.home),
        book=book,
        consent=None if consent is None else unseal(consent).open(Consent, T_CONSENT),
        uplink=uplink,
    )
    watch.on_state = metering.feed
    node.vehicle, node.metering = watch, metering
    for task in (watch.run, metering.run, book.run):
        nursery.start_soon(task)
    try:
        yield
    finally:
        book.close(clock.now())


def _store_papers(driver: Driver, identity: Identity) -> None:
    """Into the ledger, where receipts are checked against them: a crash may have come between the
    files and it."""
    if identity.consent is not None:
        driver.post(TermsChanged(identity.consent, identity.policy, identity.fleet))


def _policy_of(identity: Identity) -> Policy | None:
    """What this car goes by: its owner's policy, as far as its fleet goes with it."""
    return None if identity.policy is None else policy_in_effect(identity.policy, identity.fleet)


def use_policy(executor: Executor, policy: Policy) -> None:
    """One that has just come into force; what runs goes by it too."""
    executor.disk_interval_s = float(policy.disk_interval_s or 0)
    executor.sandbox_least = policy.sandbox_least or 0


def moved_bytes(overlay: Overlay) -> int:
    """Sent and received, as they are on the wire."""
    return overlay.counters["bytes_sent"] + overlay.counters["bytes_received"]


async def renew_mandate_in_time(home: Path, machine: Node, driver: Driver, clock: Clock) -> None:
    """Task: a mandate lasts a week and a parked car longer. One that the account has signed
    elsewhere and somebody has installed is found in the same way."""
    while True:
        await trio.sleep(RENEW_LOOK_S)
        try:
            sealed = await trio.to_thread.run_sync(renew_mandate, home, clock.now().unix_ms)
        except (MeshError, OSError) as error:
            # What is in force goes on until it lapses; the next look may find a new one.
            log.warning("the mandate is not renewed: %s", error)
            continue
        if sealed.wire != machine.identity.mandate:
            driver.post(MandateRenewed(sealed.wire))


@asynccontextmanager
async def _closing_nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


# ---- the parts


def _open_blobs(home: Path, config: NodeConfig) -> BlobStore:
    """Thread: the blob store, and an empty folder for files on their way."""
    tmp = home / TMP_NAME
    try:
        # What lies here belonged to a process that has ended: the home is locked.
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(mode=0o700, exist_ok=True)
        return BlobStore(blobs_path(home), config.storage.blob_bytes_max)
    except OSError as error:
        raise LocalResource(f"cannot use {home}: {error.strerror}") from None


def _overlay(home: Path, config: NodeConfig) -> OverlayConfig:
    settings = config.overlay
    seed = keystore.read_seed(home, keystore.NODE)
    if seed is None:
        raise LocalResource(f"{home} has no node key; make a home with `meshnode init`")
    bootstrap = (*config.node.bootstrap, *read_network(home).genesis.bootstrap)
    return OverlayConfig(
        key_seed=seed,
        listen=config.node.listen,
        bootstrap=tuple(dict.fromkeys(bootstrap)),
        met=read_peerstore(home),
        lock_dir=run_dir(home).parent / "ports",
        dht_server=settings.dht_server,
        peers_max=config.limits.peers_max,
        connections_max=settings.connections_max,
        ping_interval_s=settings.ping_interval_s,
        ping_timeout_s=settings.ping_timeout_s,
        gossip_heartbeat_s=settings.gossip_heartbeat_s,
    )


async def _open_metering(
    stack: AsyncExitStack, config: NodeConfig, policy: Policy | None
) -> Metering | None:
    """None for a node that runs nobody's work, or may not: nothing draws energy for it."""
    if policy is None or not config.node.provides or config.compute.slots < 1:
        return None
    return await stack.enter_async_context(open_metering(policy, config.vehicle.board))


async def _open_executor(
    stack: AsyncExitStack,
    home: Path,
    config: NodeConfig,
    blobs: BlobStore,
    terms: Policy | None,
    meter: Metering | None,
) -> Executor | None:
    """None for a node that runs nobody's work: no worker, no zygote."""
    settings = config.compute
    if not config.node.provides or settings.slots < 1:
        return None
    parent = Path(settings.zygote_parent) if settings.zygote_parent else None
    executor = ExecutorConfig(
        run_dir=run_dir(home),
        slots=settings.slots,
        zygote_parent=parent,
        idle_stop_s=settings.idle_stop_s,
        workers_max=settings.workers_max,
        memory_mb_max=settings.memory_mb_max,
        load_s_max=settings.load_s_max,
        threads=settings.threads,
        probe_cache=home / "probe.cbor",
        executable_cache=executables_path(home) if settings.executable_bytes_max else None,
        executable_bytes_max=settings.executable_bytes_max,
        sandbox_least=(terms.sandbox_least or 0) if terms is not None else 0,
        disk_interval_s=float((terms.disk_interval_s or 0) if terms is not None else 0),
        cgroup=settings.worker_cgroup,
        share_device=settings.share_device,
        log_workers=settings.worker_log,
    )
    return await stack.enter_async_context(
        open_executor(executor, blobs, NodeArtifacts(blobs), meter)
    )


# ---- the process


async def serve(home: Path, config: NodeConfig, ready_fd: int | None = None) -> None:
    """Run until a signal, `shutdown` over the control socket, or idleness; then drain and end."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_node(home, config) as node, trio.open_nursery() as nursery:
            # What start-up left is never garbage: a collection looks at a third of the objects.
            gc.collect()
            gc.freeze()
            nursery.start_soon(_signals, signals, node)
            if config.node.idle_exit_s > 0:
                nursery.start_soon(_idle, node, config.node.idle_exit_s)
            _say_ready(node, ready_fd)
            await node.stopping.wait()
            await _drain(node)
            nursery.cancel_scope.cancel()


async def _signals(signals: AsyncIterator[int], node: RunningNode) -> None:
    async for number in signals:
        if node.stopping.is_set():  # asked twice: at once
            raise KeyboardInterrupt
        log.info("%s: draining", signal.Signals(number).name)
        node.stop()


async def _idle(node: RunningNode, idle_exit_s: float) -> None:
    idle_s = 0.0
    while idle_s < idle_exit_s:
        await trio.sleep(IDLE_POLL_S)
        idle_s = 0.0 if node.clients or node.busy else idle_s + IDLE_POLL_S
    log.info("nothing to do for %.0f s", idle_s)
    node.stop()


async def _drain(node: RunningNode) -> None:
    """No new leases; those in work get a bounded time."""
    node.driver.post(Drain(Reason.SHUTDOWN))
    with trio.move_on_after(node.config.node.drain_s):
        while node.leases_running:  # noqa: ASYNC110 - the machine wakes nobody for it
            await trio.sleep(DRAIN_POLL_S)


def _say_ready(node: RunningNode, ready_fd: int | None) -> None:
    if ready_fd is None:
        return
    line = {
        "ready": True,
        "pid": os.getpid(),
        "peer": peer_text(node.peer),
        "network": node.network.hex(),
        "addrs": list(node.addrs),
        "control": str(socket_path(node.home, SOCKET_NAME)),
    }
    with contextlib.suppress(OSError), os.fdopen(ready_fd, "w") as pipe:
        pipe.write(json.dumps(line) + "\n")


def main(home: Path, config: NodeConfig, ready_fd: int | None = None) -> int:
    """`serve` as a process: the exit code; what went wrong is one line on stderr."""
    try:
        trio.run(serve, home, config, ready_fd)
    except BaseException as error:  # noqa: BLE001 - the process's last line
        return _last_line(error)
    return 0


def _last_line(error: BaseException) -> int:
    single = error
    while isinstance(single, BaseExceptionGroup):
        # Of several that fell together the first that speaks to the user, else the first.
        known = [e for e in single.exceptions if isinstance(e, MeshError | BaseExceptionGroup)]
        single = (known or list(single.exceptions))[0]
    if isinstance(single, KeyboardInterrupt):
        return 130
    if isinstance(single, MeshError):
        print(f"meshnode: {single}", file=sys.stderr)
        return single.exit_code
    log.error("the node failed", exc_info=error)
    text = " ".join(str(single).split())[:300]
    print(f"meshnode: a bug ended the node: {type(single).__name__}: {text}", file=sys.stderr)
    return 1
