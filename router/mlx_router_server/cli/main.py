"""Arguments to commands. Errors are one line on standard error; exit codes: 0 done, 1 failed, 2 wrong usage,
3 no router answers, 4 no such model."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlx_router_server.access.keys import Scope
from mlx_router_server.cli import completion, config, doctor, keys, logs, manage, models, run, service, top
from mlx_router_server.cli.client import ApiError, NoRouter
from mlx_router_server.settings import Settings, describe_settings, flags_of
from mlx_router_server.settings_layers import SettingsError, load_settings
from mlx_router_server.version import __version__

__all__ = ["EXIT_FAILED", "EXIT_NO_MODEL", "EXIT_NO_ROUTER", "EXIT_USAGE", "build_parser", "main"]

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_ROUTER: Final = 3
EXIT_NO_MODEL: Final = 4

Command = Callable[[argparse.Namespace, Settings], int]


def main() -> None:
    """Run the command that ``sys.argv`` names and exit."""
    _prepare_streams()
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        completion.complete(parser)
    options, rest = parser.parse_known_args()
    if rest:
        if options.command is not run.run or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.prompt += rest  # argparse has given up on a list of words when a flag stood before it
    try:
        command: Command = options.command
        status = command(options, _settings_for(options))
        sys.stdout.flush()
    except SettingsError as error:
        status = _complain(str(error), EXIT_USAGE)
    except NoRouter as error:
        status = _complain(str(error), EXIT_NO_ROUTER)
    except ApiError as error:
        status = _complain(error.message, EXIT_NO_MODEL if error.status == 404 else EXIT_FAILED)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `mlx-router list | head`
        status = EXIT_FAILED
        _drop_output()
    except OSError as error:  # a full disk behind standard output, a home folder that is a file
        where = f"{error.filename}: " if error.filename else ""
        status = _complain(f"{where}{error.strerror or error}", EXIT_FAILED)
        _drop_output()
    sys.exit(status)


def _start(options: argparse.Namespace, settings: Settings) -> int:
    # Imported when needed: the server takes a third of the time of any other command.
    from mlx_router_server.cli.start import start

    return start(options, settings)


def _prepare_streams() -> None:
    """Have all three streams, whatever is closed, and write what an encoding lacks as a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """What is still buffered cannot be written, and must not be tried again at the exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settings_for(options: argparse.Namespace) -> Settings:
    """The settings that a command uses. A file that cannot be read stops the commands that run a router or show the
    settings; the others go on without it and say so, and doctor reports it among its findings."""
    command: Command = options.command
    if command is service.service:
        return Settings()  # a service reads the settings of its unit
    try:
        return load_settings(flags_of(options), dict(os.environ), options.config)
    except SettingsError as error:
        if command in (_start, config.show):
            raise
        settings = load_settings(flags_of(options), dict(os.environ), options.config, ignore_file=True)
        if command is doctor.doctor:
            options.settings_error = str(error)
        elif command not in (config.path, config.schema, config.check, completion.completion, models.version):
            _complain(f"the configuration is left out: {error}", 0)
        return settings


def _complain(text: str, status: int) -> int:
    print(f"mlx-router: {text}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-router",
        description="One address for every local MLX model: Ollama- and OpenAI-compatible, loaded on demand.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-router {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _add_start(commands.add_parser("start", aliases=["serve"], help="run the router in the foreground"))

    stop = _client(commands.add_parser("stop", help="stop the router, or unload MODEL"), models.stop)
    stop.add_argument("model", nargs="?", metavar="MODEL")
    stop.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait for the router to be gone")
    _table(_client(commands.add_parser("status", help="the router and every model"), models.status))
    _table(_client(commands.add_parser("ps", help="models that are loaded"), models.ps))
    listing = _table(_client(commands.add_parser("list", aliases=["ls"], help="models that can be asked for"), models.list_models))  # fmt: skip  # noqa: E501
    listing.add_argument("prefix", nargs="?", default="", metavar="PREFIX")
    listing.add_argument("--aliases", action="store_true", help="short names, and the repositories they stand for")
    show = _table(_client(commands.add_parser("show", help="what is known of a model"), models.show))
    for part in ("license", "modelfile", "parameters", "template", "system"):
        show.add_argument(f"--{part}", action="store_true", help=f"only its {part}")
    show.add_argument("model", metavar="MODEL")
    load = _table(_client(commands.add_parser("load", help="load a model now"), models.load))
    load.add_argument("model", metavar="MODEL")
    unload = _table(_client(commands.add_parser("unload", help="unload a model once it is idle"), models.unload))
    unload.add_argument("model", metavar="MODEL")

    for name, command, text in (
        ("pin", models.pin, "keep a model loaded whatever comes, until unpinned or the router ends"),
        ("unpin", models.unpin, "let a pinned model go again"),
        ("plan", models.plan, "what loading a model would do now; nothing is done"),
    ):
        _table(_client(commands.add_parser(name, help=text), command)).add_argument("model", metavar="MODEL")

    chat = _client(commands.add_parser("run", help="chat with a model, or answer one prompt"), run.run)
    chat.add_argument("model", metavar="MODEL")
    chat.add_argument("prompt", nargs="*", default=[], metavar="PROMPT")
    chat.add_argument("--keepalive", metavar="DURATION", help="how long the model stays loaded afterwards")
    chat.add_argument("--think", choices=("true", "false", "low", "medium", "high", "max"), help="think or do not")
    chat.add_argument("--hidethinking", action="store_true", help="do not show the thinking")
    chat.add_argument("--format", metavar="json | SCHEMA", help="have answers keep to JSON, or to a JSON schema")
    chat.add_argument("--verbose", action="store_true", help="show timings after each answer")

    pull = _client(commands.add_parser("pull", help="fetch a model from the Hugging Face hub"), manage.pull)
    pull.add_argument("model", metavar="MODEL")
    create = _client(commands.add_parser("create", help="make a model from a Modelfile"), manage.create)
    create.add_argument("model", metavar="MODEL")
    create.add_argument("-f", "--file", type=Path, default=Path("Modelfile"), metavar="FILE",
                        help="the Modelfile; - is standard input (default: Modelfile)")  # fmt: skip
    create.add_argument("-q", "--quantize", metavar="KIND", help="pack the weights, e.g. q4_K_M, q8_0, mxfp4")
    copy = _client(commands.add_parser("cp", help="give a model another name"), manage.copy)
    copy.add_argument("source", metavar="SOURCE")
    copy.add_argument("destination", metavar="DESTINATION")
    remove = _table(_client(commands.add_parser("rm", help="remove models and what only they need"), manage.remove))
    remove.add_argument("models", nargs="+", metavar="MODEL")
    remove.add_argument("--force", action="store_true", help="also files that another program put into the cache")

    watch = _table(_client(commands.add_parser("top", help="what the router does now, once a second"), top.top))
    watch.add_argument("--once", action="store_true", help="one look")
    log = _table(
        _client(commands.add_parser("logs", help="what the router logged, of everything or of MODEL"), logs.logs)
    )
    log.add_argument("model", nargs="?", default="", metavar="MODEL")
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    log.add_argument("-n", "--lines", type=int, default=200, metavar="N", help="how many lines (default: 200)")

    _add_config(commands.add_parser("config", help="what is in force, and whether a file is right"))
    _add_service(commands.add_parser("service", help="have the router start at login or boot, and be watched"))
    _add_keys(commands.add_parser("keys", help="keys that clients have to show"))

    _table(_common(commands.add_parser("doctor", help="look for what is wrong, and say how to fix it"))).set_defaults(
        command=doctor.doctor
    )
    shells = commands.add_parser("completion", help="a script that completes commands, flags and models in a shell")
    shells.add_argument("shell", choices=("bash", "zsh", "fish"))
    shells.set_defaults(command=completion.completion, config=None)
    version = _table(_common(commands.add_parser("version", help="versions of this program and of the router")))
    version.set_defaults(command=models.version)
    _complete_models(commands.choices)
    return parser


def _complete_models(commands: dict[str, argparse.ArgumentParser]) -> None:
    """Where a model is wanted, the shell can offer those that there are."""
    for name, command in commands.items():
        for action in command._actions:
            if action.metavar in ("MODEL", "SOURCE") and name != "create":
                action.completer = completion.models_completer  # type: ignore[attr-defined]  # argcomplete looks there


def _common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file")
    parser.add_argument("--host", metavar="HOST", help="address of the router (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="PORT", help="port of the router (default: 11434)")
    return parser


def _client(parser: argparse.ArgumentParser, command: Command) -> argparse.ArgumentParser:
    _common(parser).set_defaults(command=command)
    return parser


def _table(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    show = _table(actions.add_parser("show", help="every setting, as a router that starts now would have it"))
    show.add_argument("--origin", action="store_true", help="where each of them comes from")
    check = actions.add_parser("check", help="read a file and say what is wrong with it")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE")
    path = actions.add_parser("path", help="where the file lies")
    schema = actions.add_parser("schema", help="the JSON schema of the file, for editors")
    for action, command in ((show, config.show), (check, config.check), (path, config.path), (schema, config.schema)):
        _client(action, command)


def _add_service(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    texts = {
        "install": "write the unit, start it, see that it answers; the former one comes back when it does not",
        "uninstall": "end it and remove the unit",
        "start": "start it",
        "stop": "end it, and say so when all of it is gone",
        "restart": "end it and start it anew",
        "status": "whether it runs, and answers",
        "logs": "what it logged",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("--config", type=Path, metavar="FILE", help="configuration file")
        action.add_argument("--system", action="store_true", help="a service of the machine, not of this user")
        action.add_argument("--user", metavar="NAME", help="with --system: as whom it runs (default: who called sudo)")
        action.add_argument("--manager", choices=("systemd", "launchd"), help="default: that of this platform")
        action.set_defaults(command=service.service, action=name)
        if name == "install":
            action.add_argument("--dry-run", action="store_true", help="print the unit, and do nothing")
            action.add_argument("--no-sandbox", action="store_true",
                                help="leave away what shuts the file system away (systemd)")  # fmt: skip
        elif name == "status":
            _table(action)
        elif name == "logs":
            action.add_argument("-f", "--follow", action="store_true", help="go on with what comes")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = _table(_client(actions.add_parser("add", help="make a key and show it once"), keys.add))
    add.add_argument("name", metavar="NAME")
    add.add_argument("--scope", action="append", choices=[scope.value for scope in Scope], default=[],
                     help="what it opens, several times for several; inference when nothing is said")  # fmt: skip
    add.add_argument("--model", action="append", default=[], metavar="PATTERN",
                     help="models that it may use, * stands for anything; several times for several")  # fmt: skip
    _table(_client(actions.add_parser("list", help="the keys there are"), keys.list_keys))
    remove = _client(actions.add_parser("remove", help="take a key back"), keys.remove)
    remove.add_argument("name", metavar="NAME")


def _add_start(parser: argparse.ArgumentParser) -> None:
    """Every setting is a flag: a setting without one cannot exist."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file")
    parser.add_argument("--models-dir", dest="models_dirs", action="append", metavar="FOLDER",
                        help="a folder with MLX models; may be given several times")  # fmt: skip
    for field in describe_settings():
        if field.name == "models_dirs":
            continue
        default = field.default
        shown = (
            ""
            if default in ("", ())
            else f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        )
        unit = f" In {field.metadata['unit']}." if field.metadata["unit"] else ""
        parser.add_argument(
            "--" + field.name.replace("_", "-"), metavar="VALUE", help=field.metadata["help"] + unit + shown
        )
    parser.set_defaults(command=_start)
