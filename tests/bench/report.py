"""The documents that the benchmarks write: figures with the machine and the versions they were taken on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil

from tests.bench.throughput import ROUNDS

__all__ = ["machine_lines", "sections", "write_report"]

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def machine_lines() -> list[str]:
    """Date, machine and versions, as a list in Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "pyzmq", "starlette", "uvicorn"))
    memory = psutil.virtual_memory().total / 2**30
    return [
        f"- Date: {time.strftime('%Y-%m-%d')}",
        f"- Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} cores (virtual, shared), {memory:.0f} GiB, "
        "CPU back end of MLX; not measured on Apple silicon",
        f"- Versions: Python {platform.python_version()}, {versions}",
    ]


def write_report(found: dict[str, Any]) -> None:
    """All figures of one run; see ``tests.bench.__main__`` for what they are."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; every ratio was taken in one run on one machine. [Many swaps](benchmarks-swaps.md) are",
        "measured apart.",
        "",
        *machine_lines(),
        "",
        *sections(found),
        *_router_itself(found),
    ]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(lines), encoding="utf-8")
    print(DOCUMENT.read_text(encoding="utf-8"))


def sections(found: dict[str, Any]) -> list[str]:
    """The sections of the parts that were measured, as lines of Markdown."""
    parts: dict[str, Callable[[Any], list[str]]] = {
        "throughput": _throughput, "imports": _imports, "cold_loads": _cold_loads, "alternate": _alternate, "back_to_back": _back_to_back,
        "structured": _structured, "beside": _beside, "long_row": _long_row, "equal_prompts": _equal_prompts,
        "sampling": _sampling,
    }  # fmt: skip
    return [line for name, render in parts.items() if name in found for line in render(found[name])]


def _throughput(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Decoding through HTTP over the bare batch generator",
        "",
        "Tokens per second of all streams together, `/api/chat` streamed, greedy, random bfloat16 models. The floor is",
        "a loop over `mlx_lm.generate.BatchGenerator` with the same model, prompts and batch sizes",
        f"(`tests/bench/bare.py`). {ROUNDS} short rounds of each, taken alternately; the ratio is that of all tokens",
        "over all seconds, the range holds the middle half of the rounds' own ratios. Wanted: 0.95.",
        "",
        "| model | streams | bare tokens/s | HTTP tokens/s | ratio | middle half |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['streams']} | {r['floor']:.1f} | {r['http']:.1f} | **{r['ratio']:.3f}** | "
            f"{r['range'][0]:.3f} to {r['range'][1]:.3f} |"
            for r in rows
        ),
        "",
    ]


def _imports(seconds: dict[str, float]) -> list[str]:
    return [
        "## Imports of a worker",
        "",
        "What a start without any warm worker pays, in a process of its own, medians of 9. Of `import mlx_lm` the larger part",
        "are two readings of all of its model files by transformers, which cannot be avoided without changing libraries.",
        "",
        "| what | seconds |",
        "|---|---|",
        f"| all imports of a worker for text | {seconds['worker']:.2f} |",
        f"| `import mlx_lm` alone | {seconds['mlx_lm']:.2f} |",
        f"| the two readings of transformers' model files in it | {seconds['scans']:.2f} |",
        "",
    ]


def _cold_loads(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Cold loads",
        "",
        "From a request to its first token at the client, model not loaded, after a pause; the floor is a process",
        "that has imported everything, reads the weights and makes one token (`tests/bench/bare_load.py`). For each",
        "`worker_source`: `fork` with a fork server, `standby` with an idle worker, `spawn` with neither. Medians of",
        "alternating rounds. Wanted: 1.25 with the first two.",
        "",
        "| model | worker_source | rounds | floor | ours | ratio |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['source']} | {r['rounds']} | {r['floor']:.3f} s | {r['ours']:.3f} s | **{r['ratio']:.3f}** |"
            for r in rows
        ),
        "",
    ]


def _alternate(swap: dict[str, Any]) -> list[str]:
    return [
        "## Swaps against mlx_lm.server",
        "",
        "`python -m mlx_lm.server` and mlx-router in one run, one after the other (ours, theirs, theirs, ours), each swapping",
        f"between {swap['small']} and {swap['large']} {swap['times']} times each way with room for one: from the request to",
        "the first piece of text of a short prompt",
        "that neither has seen before (mlx_lm.server keeps what it has read of a prompt beyond a swap; mlx-router does not",
        "yet). Medians. Wanted: a ratio of 1.0. With both alive and swapping by turns it was 1.16 to 1.44 in earlier runs.",
        "",
        "| to | mlx-router | mlx_lm.server |",
        "|---|---|---|",
        *(
            f"| {model} | {swap['ours'][model]:.3f} s | {swap['theirs'][model]:.3f} s |"
            for model in (swap["small"], swap["large"])
        ),
        f"| both, ratio | **{swap['ratio']:.3f}** | 1 |",
        f"| memory of the process tree after the last swap back to {swap['small']}, shared pages counted once | "
        f"{swap['our_memory'] / 1e6:.0f} MB | {swap['their_memory'] / 1e6:.0f} MB |",
        "",
    ]


def _back_to_back(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Swaps back to back",
        "",
        "The same without any pause, and between models of one size: each request is sent when the one before is answered,",
        f"for the model that is not loaded; {rows[0]['swaps']} swaps each. From the request to the end of an answer of one token,",
        "median (worst). Wanted: a ratio of 1.0 for 1 GB, 1.3 for 8 MB. With memory for both, one loads while the other",
        "exits; with memory for one (`memory_budget`), it loads when the memory of the other is back.",
        "",
        "| models | memory for | mlx-router | mlx_lm.server | ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {' and '.join(r['models'])} | {r['memory_for']} | {r['ours']:.3f} s ({r['worst']:.3f}) | {r['theirs']:.3f} s ({r['their_worst']:.3f}) | "
            f"**{r['ratio']:.3f}** |"
            for r in rows
        ),
        "",
    ]


def _beside(found: Any) -> list[str]:
    return [
        "## A long prompt beside running answers",
        "",
        "Four answers of the 8 MB model are running when a prompt of 5,000 tokens arrives, over HTTP; the median of two",
        "rounds (`make bench` part `beside`).",
        "",
        "| | measured | required |",
        "|---|---|---|",
        f"| tokens/s of the running answers, over without the prompt ({found['rate']:.0f} each) | {found['kept']:.2f} | >= 0.45 |",
        f"| longest gap in any of them | {found['longest_gap'] * 1000:.0f} ms | <= 400 ms |",
        f"| first token of the prompt over alone ({found['alone']:.2f} s) | {found['first_token']:.2f} | <= 2.3 |",
        "",
    ]


def _long_row(found: Any) -> list[str]:
    return [
        "## A long conversation beside short ones",
        "",
        "Seven answers to short prompts, and then one more to a prompt of 6,000 tokens, 8 MB model, over HTTP (`make bench`",
        f"part `long_row`): the short ones keep {found['kept']:.2f} of their {found['rate']:.0f} tokens/s each (required: 0.6), the long one gets",
        f"{found['long_rate']:.0f} tokens/s.",
        "",
    ]


def _equal_prompts(found: Any) -> list[str]:
    return [
        "## Prompts at once",
        "",
        "Eight prompts of 2,000 tokens at once, 8 MB model, over HTTP (`make bench` part `equal_prompts`): the mean time to the",
        f"first token is {found['mean']:.2f} of the last one's {found['last']:.1f} s (required: 0.65; all at once would be 1.0).",
        "",
    ]


def _sampling(found: Any) -> list[str]:
    rows = [
        f"| {row['streams']} | {row['greedy']:.0f} | {row['default']:.0f} | {row['ratio']:.2f} | 0.9 |" for row in found
    ]
    return [
        "## Sampling",
        "",
        "Ollama's default sampling (top-k 40, top-p 0.9, temperature 0.8) beside greedy, vocabulary of 151,936, over HTTP,",
        "alternating rounds (`make bench` part `sampling`), tokens/s:",
        "",
        "| streams | greedy | default | ratio | required |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _structured(made: dict[str, Any]) -> list[str]:
    return [
        "## Structured output",
        "",
        f"A random model of {made['megabytes']:.0f} MB with a vocabulary of {made['vocabulary']}, {made['streams']} streams, in the engine",
        "itself: time per token of answers held by a JSON schema, over answers that are free. Alternating rounds. Wanted:",
        "less than 10 % more. The first structured request of a worker builds the grammar library's view of the",
        f"vocabulary: {made['build_s']:.2f} s, once.",
        "",
        "| streams | free | with a schema | cost |",
        "|---|---|---|---|",
        f"| {made['streams']} | {made['free_ms']:.2f} ms | {made['held_ms']:.2f} ms | **{made['cost']:+.1%}** |",
        f"| 1 | {made['free_1_ms']:.2f} ms | {made['held_1_ms']:.2f} ms | {made['cost_1']:+.1%} |",
        "",
        f"Valid JSON by the same model, which knows nothing, at temperature 1: {made['valid_alone']} of 100 alone, {made['valid_mixed']} of 100 in",
        "batches of 16 that are shared with free streams.",
        "",
    ]


def _router_itself(found: dict[str, Any]) -> list[str]:
    first, died, idle, lists = found["first_token"], found["crash"], found["footprint"], found["listing"]
    watched, ready, resident, calls = found["watching"], found["readiness"], found["resident"], found["calls"]
    return [
        "## The router itself",
        "",
        "| what | figure | limit |",
        "|---|---|---|",
        f"| added time to first token, warm, p50 | {first['p50']:.2f} ms | 2 ms |",
        f"| added time to first token, warm, p99 | {first['p99']:.2f} ms | 8 ms |",
        f"| readiness seen after the worker says so, p50 of {ready['times']} loads | {ready['rest']['p50']:.2f} ms | |",
        f"| the same, p99 | {ready['rest']['p99']:.2f} ms | 10 ms |",
        f"| the same while another model answers all the time, on the same cores: p50, p99 | {ready['busy']['p50']:.2f} ms, "
        f"{ready['busy']['p99']:.2f} ms | |",
        f"| a loaded model's answer while 1 GB is loaded beside it, over alone (p50 of {resident['samples']}, "
        f"{resident['beside_ms']:.0f} over {resident['alone_ms']:.0f} ms; the load itself keeps {resident['cores']:.2f} of "
        f"{os.cpu_count()} cores busy) | {resident['ratio']:.2f} | |",
        "| the same beside a program that does nothing but keep one core busy: what the share of the cores alone is worth | "
        f"{resident['burnt']:.2f} | |",
        f"| what the load costs beyond that share | {resident['ratio'] / resident['burnt']:.2f} | 1.3 |",
        f"| {calls['calls']} calls A B A B … at once with room for one: loads; longest wait | {calls['loads']}; "
        f"{calls['longest']:.1f} s | 6 |",
        f"| kill -9 of a worker to the client's error, median of 20 | {died['p50']:.1f} ms | 100 ms |",
        f"| the same, worst of 20 | {died['max']:.1f} ms | 100 ms |",
        f"| `/api/tags` with 500 models, p50 and p99 of 1,000 | {lists['tags_p50']:.2f} ms, {lists['tags_p99']:.2f} ms | p99 5 ms |",
        f"| `/v1/models` with 500 models | {lists['models_p50']:.2f} ms, {lists['models_p99']:.2f} ms | p99 5 ms |",
        f"| CPU of a scrape of `/metrics` ({watched['scrape_bytes'] / 1000:.0f} kB), which one a second costs of a core "
        f"| {watched['scrape_seconds']:.2%} | 1 % |",
        f"| answers per second of {watched['streams']} streams on 3 scripted models with a scrape a second, over without "
        f"({watched['scraped']:.0f} over {watched['free']:.0f}, medians of rounds by turns, which differ by more than that) "
        f"| {watched['ratio']:.3f} | |",
        f"| CPU of the router with {watched['readers']} readers of events and log, beyond that without "
        f"({watched['cpu_watched']:.1%} over {watched['cpu_free']:.1%} of a core, five answers a second) "
        f"| {watched['cpu_watched'] - watched['cpu_free']:.1%} | 5 % |",
        f"| start of the command to the first answer, median of 5 | {idle['start_s']:.2f} s | 0.8 s |",
        f"| resident memory of the router | {idle['rss_mb']:.0f} MB | 80 MB |",
        f"| CPU of the idle router over 20 s | {idle['cpu_percent']:.2f} % | about 0 % |",
        "",
    ]
