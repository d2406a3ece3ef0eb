"""What the server promises of its lifecycle, catalogue and safety, by number; docs/requirements.md is rendered from it.

A test names what it proves by ``@pytest.mark.req("R7")``. ``LATER`` are promises of releases to come: some have tests
already, none is claimed.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

__all__ = ["LATER", "REQUIREMENTS", "marked_tests"]

REQUIREMENTS: Final = {
    "R1": "The first request for a model loads it and is answered.",
    "R2": "Every inference route goes through the one door that loads on demand.",
    "R3": "One configured model, many or none: the same behaviour.",
    "R4": "One rule for names, on all routes.",
    "R5": "Unknown names are refused at once, without a look at disk or network.",
    "R6": "Names of other services are mapped by the configuration, and never looked up.",
    "R7": "Requests for the same unloaded model share one load, which outlives its first caller.",
    "R8": "What a request does while others are in its way is a policy: wait, fail, wait then fail.",
    "R9": "A look and the claim that follows from it are one step, by one owner.",
    "R10": "A swap never cuts a running stream; every lease comes back, however its request ends.",
    "R11": "Nothing that takes long runs on the event loop.",
    "R12": "Loading a model leaves the others reachable under their names.",
    "R13": "Memory is admitted by bytes: beside if it fits, after others have left if not, never if it cannot.",
    "R14": "A failed load leaves nothing behind, is told to everybody who waited, and can be tried again.",
    "R15": "A model leaves in order, and its memory is seen to be back.",
    "R16": "Warm-up is best effort: its failure costs a warning.",
    "R17": "What is loading, since when, how far and who waits can be asked.",
    "R18": "Importing starts nothing; the application can be started many times in one process.",
    "R19": "A cold start may take minutes: streams get signs of life, others a time to come back.",
    "R20": "Every setting can be reached from file, environment and command line.",
    "R21": "A setting that is accepted takes effect.",
    "R22": "No state in modules: a second import changes nothing.",
    "R23": "Derived values never overwrite what was said explicitly.",
    "R24": "No code that never runs.",
    "R25": "Everything that can be asked for is listed, under the name that works.",
    "R26": "A swap changes no list.",
    "R27": "What a model is comes from its content, never from its name.",
    "R28": "Files that MLX cannot serve are not offered.",
    "R29": "Listing never walks a disk.",
    "R30": "Models that cannot chat are told apart.",
    "R31": "Safe by default: loopback, local models, no downloads unasked.",
    "R32": "A requested name is only ever a key.",
    "R33": "No code of a repository is run; workers are started with next to nothing.",
    "R34": "Few dependencies, and the router imports no model code.",
    "R35": "Every promise has a test that names it.",
    "R36": "Figures in the documents say where they come from.",
    "R37": "Tested on the Python versions that are declared.",
    "R38": "The number of tests can be believed.",
    "R39": "Routes know the door, and nothing of how models are run.",
    "R40": "One state machine for loading, idling, swapping and draining.",
    "R41": "Accepted with the clients that people use.",
    "R42": "A request is checked as a whole before any model is touched.",
    "R43": "Features stand behind settings; old configurations keep working.",
    "R44": "No thrashing: models take turns, and nobody starves.",
    "R45": "A loaded model does not suffer from the load of another.",
    "R46": "A crash or a hang is heard by its own streams at once, and by no others.",
    "R47": "A model that keeps failing is paused, then given up; memory is looked at before the next try.",
    "R48": "No process outlives the router, however that ended.",
    "R49": "Stopping reports success only when everything is gone.",
    "R50": "Every worker has its share of the machine, and the shares fit into it.",
    "R51": "A client that leaves stops its generation within a token or two.",
    "R52": "Everything is bounded: queues, waits, bodies, lines.",
}

LATER: Final[frozenset[str]] = frozenset()


def marked_tests(root: Path, mark: str = "req") -> dict[str, list[str]]:
    """The tests that carry each argument of a mark, as ``path::name``; found in the source, so that nothing has to be
    imported."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{mark}":
                    for argument in decorator.args:
                        assert isinstance(argument, ast.Constant), f"{path}: {node.name}"
                        found.setdefault(str(argument.value), []).append(f"{path.relative_to(root)}::{node.name}")
    return found
