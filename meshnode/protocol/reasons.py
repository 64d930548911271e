"""The one registry of reason codes: refusals, suspends, ends and explanations.

A code crosses the wire as an integer and reaches a person as its sentence. Codes are never
reused; docs/spec/meshnode.cddl lists them and a test keeps the two equal.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class Reason(IntEnum):
    """`Reason.X.text` is the sentence a person reads."""

    text: str

    def __new__(cls, code: int, text: str) -> Self:
        member = int.__new__(cls, code)
        member._value_ = code
        member.text = text
        return member

    @classmethod
    def of(cls, code: int) -> Reason:
        """The reason of a code that is known to be one; ValueError otherwise."""
        member = cls._value2member_map_.get(code)
        if not isinstance(member, Reason):
            raise ValueError(f"{code} is no reason code")
        return member

    OK = 0, "fine"
    # ---- who are you
    OTHER_NETWORK = (
        1,
        "the peer belongs to another network; check its address and the genesis file",
    )
    VERSION = 2, "the peer speaks no protocol version that this node speaks"
    BAD_FRAME = 3, "the peer sent a frame that the protocol does not allow"
    BAD_SIGNATURE = 4, "a signature does not hold"
    NOT_YOURS = 5, "the object names another peer than the one who sent it"
    EXPIRED = 6, "the object has expired, or a clock is wrong by more than two minutes"
    BLOCKED = 7, "the owner has blocked this account or artifact"
    CLOCK_SKEW = 8, "the clocks of the two nodes differ by more than two minutes"
    # ---- may you
    NO_CONSENT = 16, "the owner has given no valid consent; run `meshnode init`"
    NOT_PROVIDING = 17, "this node does not run other people's work"
    SUBMITTER = 18, "the owner's policy does not admit this submitter"
    NO_AGREEMENT = 19, "no agreement is in force between the two accounts"
    PRICE = 20, "the price is below what the work costs this car"
    CREDIT = 21, "too much is open between the two accounts"
    CURRENCY = 22, "the two sides do not use the same currency"
    ACCOUNT_CAP = 23, "the owner's policy allows this account no more within 24 hours"
    METERED = 24, "the car is on a mobile link whose bytes its owner saves"
    # ---- can you
    BUSY = 32, "all slots are taken"
    DRAINING = 33, "the car is about to leave and takes no new work"
    BUDGET = 34, "the battery budget does not cover this run"
    CHARGE_FLOOR = 35, "the battery is at the owner's charge floor"
    TEMPERATURE = 36, "the battery is outside its temperature window"
    DRIVING = 37, "the car is in use"
    UNPLUGGED = 38, "the owner allows work only while plugged in"
    LEASE_LENGTH = 39, "the run would last longer than the car stays"
    MEMORY = 40, "the run needs more memory than the car offers"
    UNKNOWN_ARTIFACT = (
        41,
        "the artifact is not one of the built-in kernels of this node",
    )
    KERNEL_SPEC = (
        42,
        "the arguments do not fit the kernel: check number, dtype and shape",
    )
    JAX_WINDOW = 43, "the artifact was exported by a jax outside the car's window"
    NO_WORKER = 44, "the car could not start a worker"
    TOO_LARGE = 45, "a size or count is over the protocol's bound"
    READINGS = 46, "the car's readings are missing or too old"
    LOW_VOLTAGE = 47, "the 12 V battery is below the owner's limit"
    SANDBOX = (
        48,
        "the car's workers lack a sandbox layer that its kernel has or its owner asks for",
    )
    NO_TOKEN = 49, "no idle car is at hand there"
    ASLEEP = 50, "the car is not needed and sleeps for a while"
    QUIET_HOURS = 51, "the owner keeps this time of the day free"
    ARTIFACT_FORMAT = 52, "the bytes are no artifact; `mesh artifact build` makes one"
    ARTIFACT_OP = 53, "the artifact uses an operation that cars do not run"
    ARTIFACT_CALL = 54, "the artifact calls native code, which only a release's own kernels may"
    ARTIFACT_EFFECTS = 55, "the artifact has effects, callbacks or disabled checks"
    ARTIFACT_SHAPES = 56, "the artifact has a shape or dtype that is not one fixed array"
    ARTIFACT_SIGNATURE = 57, "the artifact's header says other arguments or results than its code"
    ARTIFACT_LIMITS = 58, "the artifact is over a bound of size, nesting or number of operations"
    ARTIFACT_CONSTANT = 59, "the artifact holds a large constant; pass it as an argument"
    ARTIFACT_PLATFORM = 60, "the artifact was not exported for this platform"
    ARTIFACT_MANIFEST = 61, "the manifest does not fit the artifact beside it"
    JUST_PARKED = 62, "the car does not stand for as long as its owner asks for"
    PAUSED = 63, "the owner has paused the car"
    # ---- what happened
    DONE = 64, "all units are done"
    FAILED_BY_JOB = 65, "the kernel failed on these inputs"
    STOPPED_BY_OWNER = 66, "the owner took the car back"
    STOPPED_BY_REQUESTER = 67, "the requester cancelled"
    WALL_CLOCK = 68, "the run took longer than its limit and was killed, or would take longer"
    WORKER_DIED = 69, "the worker process died"
    BLOB_MISSING = 70, "no holder gave the blob"
    BLOB_CORRUPT = 71, "a chunk does not match its digest"
    DISK_FULL = 72, "the disk is full"
    LEASE_LOST = 73, "the car fell silent and its lease ran out"
    PEER_DOWN = 74, "the connection to the car was lost"
    NO_ANSWER = 75, "the car did not answer the offer in time"
    SUPERSEDED = 76, "another attempt of the task is in force"
    DUPLICATE = 77, "the units were already accepted from another attempt"
    CANCELLED = 78, "the submitter cancelled the job"
    DEADLINE = 79, "the deadline passed"
    NOBODY = 80, "no car in reach can or may run this"
    MISMATCH = 81, "the receipt does not match the results that came"
    GAP = 82, "the receipt chain has a gap"
    EQUIVOCATION = 83, "two different objects were signed for one place in the chain"
    QUEUE_FULL = 84, "the peer reads too slowly; the queue to it is full"
    UNREACHABLE = 85, "nobody answers at the address; check --join and that a node runs there"
    SHUTDOWN = 86, "the node is shutting down"
    STORAGE = 87, "this machine's disk refused a write or cannot keep up"
    HELD = 88, "the car that was found holds a slot for the next attempt"
    # ---- why it waits (explain)
    WAITS_BLOB = 96, "waiting for blobs to arrive"
    WAITS_SLOT = 97, "waiting for a free car"
    WAITS_AGREEMENT = 98, "waiting for the agreement to be signed"
    WAITS_BIDS = 99, "announced in the cell, waiting for bids"
    WAITS_LINK = 104, "not connected to the car; it is being dialled"
    WAITS_BACKOFF = 105, "the car is left alone for a moment after a failure"
    WAITS_ANSWER = 106, "offered, waiting for the car's answer"
    WAITS_CHECKPOINT = 107, "waiting for the checkpoint of a car that left to arrive"
    WAITS_TOKEN = 108, "with a rendezvous, waiting for an idle car"
    NOT_NAMED = 109, "the job names other cars or owners"
