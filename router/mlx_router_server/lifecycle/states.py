"""The states of a model and the transitions between them, as data; docs/states.md is rendered from this table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

__all__ = ["HOLDS_MEMORY", "TRANSITIONS", "Cause", "IllegalTransition", "State", "check_transition"]


class State(StrEnum):
    """Where a model is in its life; counts, reasons and times are data beside the state."""

    UNLOADED = "unloaded"
    """No process, nobody waits."""
    QUEUED = "queued"
    """It is wanted and there is no room yet."""
    STARTING = "starting"
    """Memory is reserved; a worker process is being obtained."""
    LOADING = "loading"
    """The worker reads the weights and warms up."""
    READY = "ready"
    """Requests are served."""
    DRAINING = "draining"
    """Running requests finish; new ones wait."""
    STOPPING = "stopping"
    """The process ends and its memory is watched coming back."""
    BACKOFF = "backoff"
    """A load failed; tried again when somebody asks after a pause."""
    FAILED = "failed"
    """Failed too often; tried again only after a long pause or when told to."""


class Cause(StrEnum):
    """Why a model leaves, in one word that can be counted; the sentence beside it says the rest."""

    EVICTED = "evicted"
    IDLE = "idle"
    CLIENT = "client"
    OPERATOR = "operator"
    PRESSURE = "pressure"
    FAILURE = "failure"
    SHUTDOWN = "shutdown"


TRANSITIONS: Final[dict[State, dict[State, str]]] = {
    State.UNLOADED: {State.QUEUED: "requested, preloaded or restored"},
    State.QUEUED: {
        State.STARTING: "room reserved",
        State.UNLOADED: "nobody waits any more, or refused",
    },
    State.STARTING: {State.LOADING: "worker said hello", State.STOPPING: "start failed, or told to stop"},
    State.LOADING: {State.READY: "loaded", State.STOPPING: "load failed, or told to stop"},
    State.READY: {
        State.DRAINING: "told to leave while in use",
        State.STOPPING: "told to leave, idle for too long, or crashed",
    },
    State.DRAINING: {
        State.STOPPING: "last request finished, cut at the limit, or crashed",
        State.READY: "kept: drain limit passed, or nobody needs its room any more",
    },
    State.STOPPING: {
        State.UNLOADED: "memory is back",
        State.QUEUED: "memory is back, somebody waits",
        State.BACKOFF: "memory is back after a failure",
        State.FAILED: "memory is back after too many failures",
    },
    State.BACKOFF: {State.QUEUED: "requested after the pause", State.UNLOADED: "cleared"},
    State.FAILED: {State.QUEUED: "requested after the pause, or told to", State.UNLOADED: "cleared"},
}

HOLDS_MEMORY: Final = frozenset({State.STARTING, State.LOADING, State.READY, State.DRAINING, State.STOPPING})
"""States with a worker, and so with a reservation: a stopping worker keeps it until its memory is seen gone."""


class IllegalTransition(Exception):
    """A defect of this program; names both ends."""


def check_transition(model: str, old: State, new: State) -> None:
    """Raise ``IllegalTransition`` unless the table allows it."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{model}: {old} -> {new}")
