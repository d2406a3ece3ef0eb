"""What a running router tells: metrics that add up, its log, requests that are kept."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.events import EventStream
from tests.support.fakes import fake_config
from tests.support.http import RawStream, call
from tests.support.router import RouterProcess, running_router, wait_until

_STREAMS = 16


def _samples(router: RouterProcess) -> list[tuple[str, dict[str, str], float]]:
    reply = call(router, "GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return [
        (sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    ]


def _by(samples: list[tuple[str, dict[str, str], float]], name: str, *labels: str) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for sample, values, value in samples:
        if sample == f"mlx_router_{name}":
            key = tuple(values[label] for label in labels)
            found[key if len(key) != 1 else key[0]] += int(value)
    return found


def test_totals_equal_what_the_clients_counted(home: Path) -> None:
    """16 streams on 3 models, on three APIs, with errors among them, scraped all the while."""
    scripts = {name: {"tokens": tokens} for name, tokens in (("a", 5), ("b", 9), ("c", 17))}
    requests: Counter[Any] = Counter()
    prompts: Counter[Any] = Counter()
    answers: Counter[Any] = Counter()
    lock, done = threading.Lock(), threading.Event()
    with (
        running_router(home, *fake_config(home, scripts)) as router,
        ThreadPoolExecutor(_STREAMS + 1) as pool,
    ):

        def work(worker: int) -> None:
            for turn in range(12):
                name = "abc"[(worker + turn) % 3]
                kind = (worker + turn) % 5
                if kind == 0:
                    reply = call(router, "POST", "/api/chat", {"model": "nobody", "messages": []})
                    route, model, usage = "/api/chat", "", None
                elif kind == 1:
                    body = {"model": name, "max_tokens": 50, "messages": [{"role": "user", "content": "go"}]}
                    reply = call(router, "POST", "/v1/messages", body)
                    said = reply.json()["usage"]
                    route, model, usage = "/v1/messages", name, (said["input_tokens"], said["output_tokens"])
                elif kind == 2:
                    body = {"model": name, "stream": True, "messages": [{"role": "user", "content": "go"}],
                            "stream_options": {"include_usage": True}}  # fmt: skip
                    reply = call(router, "POST", "/v1/chat/completions", body)
                    lines = [line for line in reply.body.splitlines() if line.startswith(b"data: {")]
                    said = json.loads(lines[-1].removeprefix(b"data: "))["usage"]
                    route, model = "/v1/chat/completions", name
                    usage = (said["prompt_tokens"], said["completion_tokens"])
                elif kind == 3:
                    reply = call(router, "POST", "/api/generate", b"{")
                    route, model, usage = "/api/generate", "", None
                else:
                    reply = call(router, "POST", "/api/generate", {"model": name, "prompt": "go"})
                    said = reply.lines()[-1]
                    route, model = "/api/generate", name
                    usage = (said["prompt_eval_count"], said["eval_count"])
                with lock:
                    requests[route, f"{model}:latest" if model else "", str(reply.status)] += 1
                    if usage is not None:
                        prompts[f"{model}:latest"] += usage[0]
                        answers[f"{model}:latest"] += usage[1]

        def scrape() -> int:
            scrapes = 0
            while not done.is_set():
                _samples(router)
                scrapes += 1
            return scrapes

        scraping = pool.submit(scrape)
        for result in [pool.submit(work, worker) for worker in range(_STREAMS)]:
            result.result(60)
        done.set()
        scrapes = scraping.result(30)

        def settled() -> Any:
            """The figures, once they have the requests whose last byte a client has just got."""
            nonlocal scrapes
            found = _samples(router)
            counted = _by(found, "requests_total", "route", "model", "status")
            own = counted.pop(("/metrics", "", "200"))
            if counted != requests:
                scrapes += 1
                return None
            assert own == scrapes
            return found

        found = wait_until(settled, "all requests are counted", 10)
    assert sum(requests.values()) == _STREAMS * 12
    assert _by(found, "prompt_tokens_total", "model") == prompts
    assert _by(found, "completion_tokens_total", "model") == answers
    ok: Counter[Any] = Counter()
    for (_, model, status), number in requests.items():
        if status == "200":
            ok[model, "ok"] += number
    assert _by(found, "answers_total", "model", "outcome") == ok
    for name in ("time_to_first_token_seconds_count", "queue_wait_seconds_count"):
        assert _by(found, name, "model") == Counter({model: number for (model, _), number in ok.items()})
    assert _by(found, "loads_total", "model") == Counter({f"{name}:latest": 1 for name in "abc"})
    apis = {api for _, values, _ in found if (api := values.get("api"))}
    assert apis == {"ollama", "openai", "anthropic", "other"}


@pytest.mark.req("R52")
def test_labels_come_from_the_catalogue_and_the_routes_only(home: Path) -> None:
    """However many names and paths somebody tries, the number of series stays."""
    with running_router(home, *fake_config(home, {"a": {}})) as router:
        router.generate("a")
        for number in range(50):
            assert call(router, "POST", "/api/generate", {"model": f"none-{number}", "prompt": "x"}).status == 404
            assert call(router, "GET", f"/none-{number}").status == 404
            assert call(router, "POST", f"/admin/models/none-{number}/load").status == 404
        found = _samples(router)
        assert not [labels for _, labels, _ in found if any("none-" in value for value in labels.values())]
        counted = _by(found, "requests_total", "route", "status")
        assert counted["unknown", "404"] == 50
        assert counted["/admin/models/{name:path}/load", "404"] == 50
        state = [labels for name, labels, _ in found if name == "mlx_router_model_state"]
        assert state == [{"model": "a:latest", "state": "ready"}]


def test_swaps_are_counted_by_why_and_by_stage(home: Path) -> None:
    arguments = fake_config(home, {"a": {}, "b": {}}, max_loaded_models=1)
    with running_router(home, *arguments) as router:
        for name in ("a", "b", "a"):
            router.generate(name)
        assert call(router, "POST", "/admin/models/a/unload").status == 200
        found = _samples(router)
        assert _by(found, "unloads_total", "model", "cause") == Counter(
            {("a:latest", "evicted"): 1, ("b:latest", "evicted"): 1, ("a:latest", "operator"): 1}
        )
        stages = _by(found, "swap_stage_seconds_count", "stage")
        assert [stages[stage] for stage in ("weights", "exit", "memory_back")] == [3, 3, 3]


def test_the_log_is_told_whole_by_model_and_as_it_grows(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {}, "b": {}})) as router:
        stream = EventStream(router, path="/admin/logs/stream?model=b")
        for name in ("a", "b"):
            router.generate(name)
        everything = router.client.get("/admin/logs")
        lines = [line["text"] for line in everything["lines"]]
        requests = [line for line in lines if line.startswith("event=request ")]
        assert len(requests) == 2
        assert all(" request=req_" in line for line in requests)
        only_a = [line["text"] for line in router.client.get("/admin/logs?model=a")["lines"]]
        assert any("event=loaded model='a:latest'" in line for line in only_a)
        assert not any("b:latest'" in line for line in only_a)
        wait_until(lambda: any("event=request " in line["text"] for line in stream.of("line")), "the line of b")
        assert not any("model='a:latest'" in line["text"] for line in stream.of("line"))
        later = router.client.get(f"/admin/logs?after={everything['last']}")
        assert all(line["number"] > everything["last"] for line in later["lines"])
        assert call(router, "GET", "/admin/logs?model=none").status == 404
        router.process.terminate()
        stream.close()


def test_a_reader_from_before_a_restart_gets_what_there_is(home: Path) -> None:
    """Its numbers are those of a router that is gone; they may be smaller than those of this one."""
    with running_router(home, *fake_config(home, {"a": {}})) as router:
        router.generate("a")
        streams = [EventStream(router, last) for last in (100_000, "0badc0de-1", "0badc0de-100000")]
        for stream in streams:
            wait_until(partial(stream.of, "request_ended"), "what happened before is told")
            assert stream.seen[0][0] == 1, "from the first on"
        whole = streams[0]
        again = EventStream(router, f"{whole.run}-{whole.seen[-2][0]}")
        wait_until(lambda: again.seen, "what came after")
        assert again.seen[0][0] == whole.seen[-1][0]
        assert again.run == whole.run
        router.process.terminate()
        for stream in (*streams, again):
            stream.close()


def test_a_log_goes_to_a_file_that_is_turned_over(home: Path) -> None:
    file = home / "logs" / "router.log"
    arguments = [*fake_config(home, {"a": {}}), "--log-file", str(file), "--log-format", "json"]
    with running_router(home, *arguments) as router:
        router.generate("a")

        def logged() -> list[dict[str, Any]]:
            return [json.loads(line) for line in file.read_text().splitlines()]

        wait_until(lambda: {"loaded", "request"} <= {line.get("event") for line in logged()}, "both lines")
        lines = logged()
        assert all(line.get("request") for line in lines if line.get("event") == "request")
    assert len(router.lines) == 1, "standard error has the address, and nothing else"


def test_requests_are_kept_when_that_is_wanted_and_keys_are_not(home: Path) -> None:
    arguments = [*fake_config(home, {"a": {"text": "the answer"}}), "--inspect-requests", "2"]
    with running_router(home, *arguments) as router:
        router.wait_line("requests_are_kept")
        replies = [
            call(router, "POST", "/api/generate", {"model": "a", "prompt": f"prompt {number}"},
                 authorization="Bearer a-secret", x_api_key="a-secret")
            for number in range(3)
        ]  # fmt: skip
        assert [reply.status for reply in replies] == [200] * 3
        kept = router.client.get("/admin/requests")
        assert kept["kept"] == 2
        assert [entry["path"] for entry in kept["requests"]] == ["/api/generate"] * 2
        newest = router.client.get(f"/admin/requests/{kept['requests'][0]['request']}")
        assert json.loads(newest["body"]["text"])["prompt"] == "prompt 2"
        assert newest["answer"]["text"].encode() == replies[-1].body
        assert newest["headers"]["authorization"] == newest["headers"]["x-api-key"] == "****"
        assert "a-secret" not in json.dumps(newest)
        assert call(router, "GET", "/admin/requests/req_none").status == 404
        assert "prompt 2" not in router.log


def test_nothing_is_kept_and_no_prompt_is_logged_by_default(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {}})) as router:
        router.generate("a", prompt="a private thing")
        assert router.client.get("/admin/requests") == {"kept": 0, "requests": []}
        assert "a private thing" not in json.dumps(router.client.get("/admin/logs"))
        assert "a private thing" not in router.log


def test_prompts_are_logged_when_a_setting_says_so_and_that_is_said(home: Path) -> None:
    arguments = [*fake_config(home, {"a": {}}), "--log-prompts", "true"]
    with running_router(home, *arguments) as router:
        router.wait_line("WARNING event=prompts_are_logged")
        router.generate("a", prompt="a public thing")
        line = router.wait_line("event=prompt ")
        assert "a public thing" in line
        assert " request=req_" in line


def test_the_tokens_of_an_answer_that_breaks_off_are_counted(home: Path) -> None:
    """At warnings only, the log still has what an operator is woken for."""
    slow = {"a": {"tokens": 1000, "tokens_per_second": 200}}
    with running_router(home, *fake_config(home, slow), "--log-level", "warning") as router:
        stream = RawStream(router, "/api/generate", {"model": "a", "prompt": "go on then", "stream": True})
        stream.read_until(b"a:latest-20")
        os.kill(router.model("a")["pid"], signal.SIGKILL)
        told = stream.read_to_end()
        assert b"error" in told
        found = wait_until(lambda: _by(_samples(router), "completion_tokens_total", "model"), "they are counted")
        assert 20 <= found["a:latest"] < 1000
        assert _by(_samples(router), "prompt_tokens_total", "model")["a:latest"] > 0
        assert "ERROR" in router.wait_line("event=worker_failed").partition("event=")[0]
        assert "event=loaded" not in router.log


def test_a_removed_model_is_neither_in_the_metrics_nor_in_the_status(home: Path) -> None:
    with running_router(home) as router:
        made = {"model": "made", "from": "demo", "parameters": {"num_ctx": 512}, "stream": False}
        assert call(router, "POST", "/api/create", made).status == 200
        router.generate("made", options={"num_predict": 1})
        assert "made:latest" in {model["name"] for model in router.status()["models"]}
        assert call(router, "DELETE", "/api/delete", {"model": "made"}).status == 200
        router.client.post("/api/generate", {"model": "demo", "keep_alive": 0})

        def shown() -> set[str]:
            gauges = set(_by(_samples(router), "model_state", "model"))
            return gauges | {model["name"] for model in router.status()["models"]}

        wait_until(lambda: shown() <= {"demo:latest"}, "only the models that are there")


def test_a_router_whose_log_nobody_reads_goes_on(home: Path) -> None:
    """Ctrl-S in a terminal, or a stuck collector behind a pipe."""
    with running_router(home, *fake_config(home, {"a": {"tokens": 1}})) as router, ThreadPoolExecutor(8) as pool:
        router.generate("a")
        router.is_read.clear()
        bodies = [{"model": "a", "messages": [{"role": "user", "content": "x"}], "unknown": "y" * 4000}] * 300
        asked = [pool.submit(call, router, "POST", "/api/chat", body) for body in bodies]
        assert {each.result().status for each in asked} == {200}
        router.is_read.set()
        last = call(router, "GET", "/api/version").status
        assert last == 200
        wait_until(lambda: sum("event=request request=" in line for line in router.lines) == 301, "what waited is here")
