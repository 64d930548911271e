"""How a reason code or an error of the node becomes an exception of the one error tree.

Beside the control socket, at both of its ends: the node names what happened by a `Reason` or by the
class of its error, the exception's class carries the exit code of the CLI.
"""

from __future__ import annotations

from typing import Any, Final

from meshnode import errors
from meshnode.errors import MeshError
from meshnode.protocol.reasons import Reason

_CLASS_OF: Final[dict[Reason, type[MeshError]]] = {
    Reason.OTHER_NETWORK: errors.NoSuitableNode,
    Reason.VERSION: errors.NoSuitableNode,
    Reason.BAD_SIGNATURE: errors.VerificationFailed,
    Reason.EQUIVOCATION: errors.VerificationFailed,
    Reason.GAP: errors.VerificationFailed,
    Reason.MISMATCH: errors.VerificationFailed,
    Reason.BLOB_CORRUPT: errors.VerificationFailed,
    Reason.PRICE: errors.BudgetExceeded,
    Reason.CREDIT: errors.BudgetExceeded,
    Reason.KERNEL_SPEC: errors.UsageError,
    Reason.TOO_LARGE: errors.UsageError,
    Reason.BUSY: errors.Refused,
    Reason.FAILED_BY_JOB: errors.TaskFailed,
    Reason.WORKER_DIED: errors.TaskFailed,
    Reason.WALL_CLOCK: errors.TimedOut,
    Reason.DEADLINE: errors.TimedOut,
    Reason.UNREACHABLE: errors.Unreachable,
    Reason.DISK_FULL: errors.LocalResource,
    Reason.CANCELLED: errors.TaskFailed,
}
_NOBODY: Final = frozenset(
    {
        Reason.NO_CONSENT,
        Reason.NOT_PROVIDING,
        Reason.SUBMITTER,
        Reason.ACCOUNT_CAP,
        Reason.NO_AGREEMENT,
        Reason.CURRENCY,
        Reason.DRAINING,
        Reason.BUDGET,
        Reason.CHARGE_FLOOR,
        Reason.TEMPERATURE,
        Reason.DRIVING,
        Reason.UNPLUGGED,
        Reason.LEASE_LENGTH,
        Reason.MEMORY,
        Reason.UNKNOWN_ARTIFACT,
        Reason.JAX_WINDOW,
        Reason.NO_WORKER,
        Reason.BLOCKED,
        Reason.NOBODY,
    }
)


_BY_CODE: Final = {int(reason): reason for reason in Reason}


def reason_of(code: int) -> Reason | None:
    return _BY_CODE.get(code)


def error_of_reason(code: int, text: str = "") -> MeshError:
    """The exception for a reason code: its class has the exit code, its text the sentence."""
    reason = reason_of(code)
    if reason is None:
        return errors.Refused(text or f"the node gave the unknown reason {code}")
    said = f"{reason.text}: {text}" if text else reason.text
    if reason in _NOBODY:
        return errors.NoSuitableNode(said)
    return _CLASS_OF.get(reason, errors.Refused)(said)


def error_of_answer(error: Any) -> MeshError:
    """The exception for an `error` map of the control socket."""
    if not isinstance(error, dict):
        return errors.LocalProtocolError("the node's answer cannot be understood")
    text = str(error.get("text") or "")
    code = error.get("reason")
    if isinstance(code, int):
        return error_of_reason(code, text)
    kind = getattr(errors, str(error.get("kind")), None)
    if isinstance(kind, type) and issubclass(kind, MeshError):
        return kind(text or None)
    return MeshError(text or None)
