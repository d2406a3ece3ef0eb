"""Ollama's bodies and lines about which models there are: /api/show, pull, create, copy, delete and push."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, field

from mlx_router_server.dialects.body import convert, read_object
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.go_template import render_prompt
from mlx_router_server.dialects.options import parse_options
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.jobs import JobDone, JobEvent, JobProgress, JobStatus

__all__ = [
    "COPY_FIELDS",
    "CREATE_FIELDS",
    "DELETE_FIELDS",
    "PULL_FIELDS",
    "PUSH_FIELDS",
    "SHOW_FIELDS",
    "CreateCall",
    "parse_copy",
    "parse_create",
    "parse_delete",
    "parse_pull",
    "parse_push",
    "parse_show",
    "status_line",
]

_ROLES: Final = ("system", "user", "assistant")
_QUANTIZATIONS: Final[dict[str, tuple[int, int, str]]] = {
    **dict.fromkeys(("q4_0", "q4_k_m", "q4_k_s", "q4", "int4", "4bit", "4"), (4, 64, "affine")),
    **dict.fromkeys(("q8_0", "q8", "int8", "8bit", "8"), (8, 64, "affine")),
    **dict.fromkeys(("q3_k_m", "q3", "3bit", "3"), (3, 64, "affine")),
    **dict.fromkeys(("q5_k_m", "q5", "5bit", "5"), (5, 64, "affine")),
    **dict.fromkeys(("q6_k", "q6", "6bit", "6"), (6, 64, "affine")),
    "mxfp4": (4, 32, "mxfp4"),
    "nvfp4": (4, 16, "nvfp4"),
    "mxfp8": (8, 32, "mxfp8"),
}
"""Ollama's words and mlx-lm's: bits, group size and mode."""


class _Named(Struct, kw_only=True):
    model: str = ""
    name: str = ""

    @property
    def asked(self) -> str:
        return (self.model or self.name).strip()


class _PullBody(_Named, kw_only=True):
    stream: bool = True


class _PushBody(_Named, kw_only=True):
    stream: bool = True


class _ShowBody(_Named, kw_only=True):
    verbose: bool = False


class _DeleteBody(_Named, kw_only=True):
    force: bool = False


class _CopyBody(Struct, kw_only=True):
    source: str = ""
    destination: str = ""


class _Turn(Struct, kw_only=True):
    role: str
    content: str = ""


class _CreateBody(_Named, kw_only=True):
    base: str = field(name="from", default="")
    files: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    quantize: str = ""
    template: str = ""
    license: str | list[str] = ""
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    stream: bool = True


_OWN_FORMAT: Final = "the model's own template and the parsers of its family are used"
PULL_FIELDS: Final = FieldRules(
    route="POST /api/pull",
    body=_PullBody,
    ignored={
        "insecure": "the address of the hub is the operator's: HF_ENDPOINT",
        "username": "the hub is asked with the operator's HF_TOKEN",
        "password": "the hub is asked with the operator's HF_TOKEN",
    },
)
PUSH_FIELDS: Final = FieldRules(
    route="POST /api/push",
    body=_PushBody,
    ignored=dict.fromkeys(("insecure", "username", "password"), "nothing is pushed"),
)
SHOW_FIELDS: Final = FieldRules(
    route="POST /api/show",
    body=_ShowBody,
    ignored={"system": "Ollama does not read it any more", "template": "as system", "options": "as system"},
    notes={"verbose": "adds the list of tensors"},
)
DELETE_FIELDS: Final = FieldRules(
    route="DELETE /api/delete",
    body=_DeleteBody,
    notes={"force": "files of the Hugging Face cache go although this server did not pull them"},
)
COPY_FIELDS: Final = FieldRules(route="POST /api/copy", body=_CopyBody)
CREATE_FIELDS: Final = FieldRules(
    route="POST /api/create",
    body=_CreateBody,
    inside={"messages[]": _Turn},
    ignored={
        "renderer": _OWN_FORMAT,
        "parser": _OWN_FORMAT,
        "requires": "it names a version of Ollama",
        "info": "facts are read from the files",
        "modelfile": "Ollama does not read it any more; the command line does, and sends its parts",
    },
    refused={
        "remote_host": "this server runs local models only",
        "draft_files": "a draft model is said in the configuration, as draft_model",
        "draft_quantize": "a draft model is said in the configuration, as draft_model",
    },
    notes={
        "files": "names and digests of files in MLX layout that were uploaded to /api/blobs",
        "adapters": "adapter_config.json and adapters.safetensors, uploaded likewise",
        "quantize": f"one of {', '.join(_QUANTIZATIONS)}",
        "template": "Go template text, as in /api/generate",
    },
)


class CreateCall(Struct, frozen=True, kw_only=True):
    """A model to be made."""

    model: str
    base: str
    files: dict[str, str]
    adapters: dict[str, str]
    quantization: tuple[int, int, str] | None
    template: str
    license: list[str]
    system: str
    parameters: dict[str, Any]
    messages: list[tuple[str, str]]
    stream: bool
    ignored: tuple[str, ...]


def parse_pull(body: bytes) -> tuple[str, bool, tuple[str, ...]]:
    """The name, whether progress is wanted as lines, and the fields that are ignored."""
    data = read_object(body, fold_case=True)
    pull = convert(data, _PullBody)
    if not pull.asked:
        raise InvalidRequest("invalid model name", param="model")
    return pull.asked, pull.stream, PULL_FIELDS.check(data)


def parse_push(body: bytes) -> tuple[str, tuple[str, ...]]:
    """The name, and the fields that are ignored."""
    data = read_object(body, fold_case=True)
    return _required(convert(data, _PushBody)), PUSH_FIELDS.check(data)


def parse_show(body: bytes) -> tuple[str, bool, tuple[str, ...]]:
    """The name, whether tensors are wanted, and the fields that are ignored."""
    data = read_object(body, fold_case=True)
    show = convert(data, _ShowBody)
    return _required(show), show.verbose, SHOW_FIELDS.check(data)


def parse_delete(body: bytes) -> tuple[str, bool, tuple[str, ...]]:
    """The name, whether files that are not ours may go, and the fields that are ignored."""
    data = read_object(body, fold_case=True)
    delete = convert(data, _DeleteBody)
    return _required(delete), delete.force, DELETE_FIELDS.check(data)


def _required(named: _Named) -> str:
    if not named.asked:
        raise InvalidRequest("model is required", param="model")
    return named.asked


def parse_copy(body: bytes) -> tuple[str, str, tuple[str, ...]]:
    """The names of source and destination, and the fields that are ignored."""
    data = read_object(body, fold_case=True)
    copy = convert(data, _CopyBody)
    return copy.source.strip(), copy.destination.strip(), COPY_FIELDS.check(data)


def parse_create(body: bytes) -> CreateCall:
    """Raises ``InvalidRequest`` for all that can be known to be wrong before anything is touched."""
    data = read_object(body, fold_case=True)
    create = convert(data, _CreateBody)
    ignored = CREATE_FIELDS.check(data)
    if not create.asked:
        raise InvalidRequest("invalid model name", param="model")
    if not create.base and not create.files:
        raise InvalidRequest("neither 'from' or 'files' was specified", param="from")
    if create.base and create.files:
        raise InvalidRequest("either 'from' or 'files' says where the weights are, not both", param="files")
    quantization = None
    if create.quantize:
        quantization = _QUANTIZATIONS.get(create.quantize.lower())
        if quantization is None:
            raise InvalidRequest(
                f"unsupported quantization {create.quantize!r}; there are {', '.join(_QUANTIZATIONS)}", param="quantize"
            )
    parameters = parse_options(create.parameters)
    if create.template:
        render_prompt(create.template, "system", "prompt")
    return CreateCall(
        model=create.asked,
        base=create.base,
        files=create.files,
        adapters=create.adapters,
        quantization=quantization,
        template=create.template,
        license=[create.license] if isinstance(create.license, str) and create.license else list(create.license),
        system=create.system,
        parameters={name: value for name, value in create.parameters.items() if value is not None},
        messages=_turns(create.messages),
        stream=create.stream,
        ignored=(*ignored, *(f"parameters.{name}" for name in parameters.ignored)),
    )


def _turns(items: list[dict[str, Any]]) -> list[tuple[str, str]]:
    turns = []
    for number, item in enumerate(items):
        turn = convert(item, _Turn, f"messages[{number}].")
        if turn.role.lower() not in _ROLES:
            raise InvalidRequest(f"role {turn.role!r} is none of {', '.join(_ROLES)}", param=f"messages[{number}].role")
        turns.append((turn.role.lower(), turn.content))
    return turns


def status_line(event: JobEvent) -> dict[str, Any]:
    """One line of progress; the last one says ``success``."""
    match event:
        case JobStatus():
            return {"status": event.text}
        case JobProgress():
            line = {"status": f"pulling {event.text or event.digest.partition(':')[2][:12]}", "digest": event.digest,
                    "total": event.total, "completed": event.completed}  # fmt: skip
            if event.digest == "sha256:quantized":
                line["status"] = event.text
            return line
        case JobDone():
            return {"status": "success"}
        case _:
            return {"error": event.message}
