"""`mesh receipts list|show|verify`: the signed record of accepted work, read from the ledger.

Works beside a running node and without one. `verify` trusts nothing but the bytes: it holds every
envelope, chain, total, mandate and acceptance against each other and exits 5 if one does not hold.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshnode.errors import UsageError, VerificationFailed

from . import frame

if TYPE_CHECKING:
    from meshnode.protocol.channel_check import Chain, Checked

EXIT_VERIFICATION = VerificationFailed.exit_code


def _checked(home: Path) -> Checked:
    from meshnode.ledger.load import signed_objects
    from meshnode.node.firstrun import read_network
    from meshnode.protocol.channel_check import check_objects

    return check_objects(signed_objects(home), read_network(home).ident)


def _row(chain: Chain, seq: int) -> dict[str, Any]:
    receipt, digest = chain.receipts[seq]
    work = receipt.work
    return {
        "digest": digest,
        "channel": chain.digest,
        "seq": seq,
        "provider": receipt.provider,
        "requester": receipt.requester,
        "job_id": work.job_id,
        "first": work.units.first,
        "units": work.units.size,
        "attempt": work.attempt,
        "outcome": work.outcome.name.lower(),
        "amount_nano": receipt.amount_nano,
        "currency": chain.agreement.currency,
        "start_ms": receipt.period_ms[0],
        "end_ms": receipt.period_ms[1],
        "accepted": seq <= chain.accepted_seq,
        "disputed_units": sum(span.size for span in chain.disputed.get(seq, ())),
    }


def _rows(checked: Checked) -> list[dict[str, Any]]:
    rows = [_row(chain, seq) for chain in checked.chains for seq in chain.receipts]
    return sorted(rows, key=lambda row: (row["start_ms"], row["channel"], row["seq"]))


@click.group(epilog="Example: mesh receipts verify")
def receipts() -> None:
    """Signed receipts of work: what cars did, and what was accepted."""


@receipts.command("list", epilog="Example: mesh receipts list --job 3f2a")
@click.option("--job", "job", metavar="JOB", help="Only of this job.")
@frame.home_options
@frame.json_option
def list_receipts(home: Path, job: str | None) -> None:
    """List the receipts of this home's ledger, oldest first."""
    rows = _rows(_checked(home))
    if job is not None:
        rows = [row for row in rows if row["job_id"].hex().startswith(job.lower())]
    if frame.face().json:
        frame.put_json({"receipts": rows})
        return
    frame.put_table(
        ("RECEIPT", "CAR", "JOB", "UNITS", "OUTCOME", "ACCEPTED", "WHEN"),
        [
            (
                row["digest"].hex()[:8],
                frame.ident(row["provider"])[-8:],
                row["job_id"].hex()[:8],
                f"{row['first']}-{row['first'] + row['units'] - 1}",
                row["outcome"],
                "disputed" if row["disputed_units"] else "yes" if row["accepted"] else "not yet",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["start_ms"] / 1000)),
            )
            for row in rows
        ],
    )


@receipts.command(epilog="Example: mesh receipts show 9c41")
@click.argument("receipt", metavar="RECEIPT")
@frame.home_options
@frame.json_option
def show(receipt: str, home: Path) -> None:
    """Show one receipt whole: parties, work, meters, totals.

    RECEIPT is its digest or the first characters of it.
    """
    checked = _checked(home)
    found = [
        (chain, seq)
        for chain in checked.chains
        for seq, (_, digest) in chain.receipts.items()
        if digest.hex().startswith(receipt.lower())
    ]
    if len(found) != 1:
        many = "no receipt" if not found else f"{len(found)} receipts"
        raise UsageError(f"{many} of this home begin with {receipt!r}; see `mesh receipts list`")
    chain, seq = found[0]
    whole, _ = chain.receipts[seq]
    fields = {
        **_row(chain, seq),
        "payee": whole.payee,
        "payer": whole.payer,
        "previous": whole.previous,
        "artifact": whole.work.artifact,
        "task_digest": whole.work.task_digest,
        "input_root": whole.work.input_root,
        "output_root": whole.work.output_root,
        "meters": whole.meters._asdict(),
        "totals": whole.totals._asdict(),
        "total_nano": whole.total_nano,
        "consent": whole.consent,
        "policy": whole.policy,
        "fleet": whole.fleet,
        "findings": [
            finding.text
            for finding in checked.findings
            if finding.channel == chain.digest and finding.seq == seq
        ],
    }
    if frame.face().json:
        frame.put_json({"receipt": fields})
        return
    for name, value in frame.plain(fields).items():
        click.echo(f"{name:<16} {value}")


@receipts.command(epilog="Example: mesh receipts verify --json")
@frame.home_options
@frame.json_option
def verify(home: Path) -> None:
    """Check every signed object of the ledger: signatures, chains, totals, mandates, acceptances.

    Exits 5 and says exactly what does not hold if anything was deleted, swapped, duplicated,
    signed again or changed. A ledger without receipts holds.
    """
    checked = _checked(home)
    findings: list[dict[str, Any]] = [
        {
            "reason": finding.reason.name,
            "text": finding.text,
            "digest": finding.digest,
            "channel": finding.channel,
            "seq": finding.seq,
        }
        for finding in checked.findings
    ]
    if frame.face().json:
        summary = {"receipts": checked.receipts, "accepted": checked.accepted}
        channels = len(checked.chains)
        frame.put_json(
            {"holds": not findings, **summary, "channels": channels, "findings": findings}
        )
    for finding in findings:
        frame.talk(f"{finding['reason']}: {finding['text']}")
    if findings:
        frame.talk(f"error: {len(findings)} things do not hold in the ledger of {home}")
        raise click.exceptions.Exit(EXIT_VERIFICATION)
    if not frame.face().json:
        frame.talk(f"{checked.receipts} receipts hold, {checked.accepted} of them accepted")
