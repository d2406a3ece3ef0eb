"""The messages between router and worker, protocol version 2; docs/protocol.md describes them and a test compares.

Two closed unions, one per direction. New fields get defaults and old readers ignore them; a field never changes its
meaning; anything else needs a new PROTOCOL_VERSION, and a worker of another version is refused by a sentence that
names both.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, field

from mlx_router_shared.generation import Request, StreamEvents

__all__ = [
    "PROTOCOL_VERSION",
    "Bootstrap",
    "Bye",
    "Cancel",
    "FromWorker",
    "GetStats",
    "Hello",
    "Load",
    "LoadFailed",
    "Loading",
    "ModelFacts",
    "Ready",
    "SetLimits",
    "Shutdown",
    "Stats",
    "Step",
    "Submit",
    "ToWorker",
    "Welcome",
    "events_identity",
]

PROTOCOL_VERSION: Final = 2


class Bootstrap(Struct, frozen=True, kw_only=True):
    """The one line of JSON on a worker's standard input; its end of file later means that the router is gone."""

    endpoint: str
    worker_id: str
    token: str
    engine: str
    """The engine kind to import before saying hello: ``mlx``, ``embed``, ``encode``, ``rerank``, ``vlm``, ``tokenizer``
    or ``fake``."""
    background: bool = False
    """Import at a low CPU priority: no request waits for this worker yet."""


def events_identity(worker_id: str) -> str:
    """The identity of a worker's second socket, on which everything but ``Hello`` and ``Stats`` comes."""
    return worker_id + ".events"


# ---------------------------------------------------------------------------------------------- to the worker


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome"):
    """The answer to ``Hello``: the worker is accepted."""

    stats_interval_seconds: float
    """How often ``Stats`` is sent unasked while there is work."""


class Load(Struct, frozen=True, kw_only=True, tag="load"):
    """Become the worker of this model; sent once in a worker's life."""

    model: str
    path: str
    """An absolute folder on this machine; the worker never touches the network."""
    adapter_path: str = ""
    """A folder with a LoRA adapter that is put on the weights; empty for none."""
    draft_path: str = ""
    """A folder with a smaller model of the same tokens that guesses ahead; empty for none."""
    context_tokens: int
    """The longest prompt plus answer that may be admitted; the model's own limit if that is less."""
    yields: bool = False
    """Other models are answering now: rest after each portion of the weights for as long as it took to read."""
    parallel: int
    """How many requests are decoded at once; the others wait inside the worker."""
    prefill_share: float = 0.46
    """Of the time, for prompts, while requests are being answered; between 0 and 1."""
    longest_gap_ms: float = 150.0
    """The longest pause between two tokens of an answer while a prompt is processed; a goal."""
    warm_up_seconds: float = 60.0
    """The longest time for a trial token before the model is said to be ready; 0: none. Its failure fails nothing."""
    memory_limit_bytes: int = 0
    """What this worker may use. MLX takes it as a guideline. 0 leaves MLX's own limit."""
    requests_limit_bytes: int = 0
    """Of these, what caches and work space of requests may use; requests that do not fit wait. 0: what
    ``memory_limit_bytes`` leaves beside the weights."""
    prefix_cache_bytes: int = 0
    """Of these, what may be kept of processed prompts and answers for requests that begin alike; 0 keeps nothing."""
    cache_limit_bytes: int = 0
    """The most that MLX may keep of freed buffers; 0 leaves MLX's own limit."""
    wired_limit_bytes: int = 0
    """The most that this worker may wire (macOS); 0 leaves the system's own limit."""


class SetLimits(Struct, frozen=True, kw_only=True, tag="set_limits"):
    """This worker's share of the machine has changed, or memory is tight; the limits are those of ``Load``."""

    memory_limit_bytes: int
    cache_limit_bytes: int
    wired_limit_bytes: int
    requests_limit_bytes: int = 0
    prefix_cache_bytes: int = 0
    trim: bool = False
    """Give back what is kept without being needed."""


class Submit(Struct, frozen=True, kw_only=True, tag="submit"):
    """Answer this request; its events follow in ``Step`` messages and end with one ``Finish`` or ``Failure``."""

    request_id: str
    request: Request


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """Drop this request; takes effect within one step, no event follows, unknown ids are ignored."""

    request_id: str


class GetStats(Struct, frozen=True, kw_only=True, tag="get_stats"):
    """Asks for a ``Stats`` message at once; answered by the socket thread, also while loading or generating."""


class Shutdown(Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Give everything back and exit with status 0."""

    reason: str
    limit_seconds: float = 5.0
    """After this time the process ends itself without ceremony."""


ToWorker = Welcome | Load | SetLimits | Submit | Cancel | GetStats | Shutdown


# -------------------------------------------------------------------------------------------- from the worker


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of a worker, sent when it could load at once."""

    protocol_version: int
    pid: int
    token: str
    engine: str
    import_seconds: float
    """From the program's first line to this message; what came before is the interpreter's start."""
    versions: dict[str, str] = field(default_factory=dict)
    working_set_bytes: int = 0
    """What the device recommends as the most to use (Metal); 0 where it does not say."""


class Loading(Struct, frozen=True, kw_only=True, tag="loading"):
    """Progress of a load; ``stage`` is ``weights`` or ``warm_up``, ``fraction`` goes from 0 to 1."""

    stage: str
    fraction: float


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What is known of a model once it is loaded."""

    context_tokens: int
    """The limit that prompt plus answer have to stay in."""
    has_chat_template: bool
    has_thinking: bool
    has_tools: bool
    is_batched: bool = True
    """Whether requests share forward passes; otherwise they take turns token by token."""
    weights_bytes: int
    memory_bytes: int
    """What the engine holds right after the load."""
    weights_seconds: float
    warm_up_seconds: float


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded and requests are taken."""

    facts: ModelFacts
    sent_at: float = 0.0
    """The wall clock of the machine when this was sent."""


class LoadFailed(Struct, frozen=True, kw_only=True, tag="load_failed"):
    """The model could not be loaded; the worker exits after this."""

    code: str
    message: str


class Step(Struct, frozen=True, kw_only=True, tag="step"):
    """The events of all streams of one engine step, or of requests that were refused before one."""

    number: int
    """Counts the engine's steps from 1."""
    streams: list[StreamEvents]


class Stats(Struct, frozen=True, kw_only=True, tag="stats"):
    """How the worker is doing: alive is that this arrives, progress is that ``steps`` moves while ``streams`` > 0."""

    steps: int
    step_age_seconds: float
    """Since the engine last finished a step or became busy; 0 when it has nothing to do."""
    streams: int
    tokens_total: int
    memory_bytes: int
    cache_bytes: int
    peak_bytes: int


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """The last message of a worker that ends as it was told to."""

    reason: str


FromWorker = Hello | Loading | Ready | LoadFailed | Step | Stats | Bye
