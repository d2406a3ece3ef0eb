"""What a client and an operator see while a model is on its way: signs of life, stages, progress, warm-up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.support.events import EventStream
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import running_router, wait_until
from tests.support.sse import read_frames

_SLOW_LOAD = {"load_seconds": 4.0, "tokens": 3}


@pytest.mark.covers("O75", "O120", "O132")
@pytest.mark.req("R19")
def test_official_clients_with_a_short_read_timeout_survive_a_cold_start(home: Path) -> None:
    """The load takes more than twice as long as they wait for a byte."""
    with running_router(home, *fake_config(home, {"a": _SLOW_LOAD}, heartbeat_seconds=0.2)) as router:
        client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", timeout=1.5, max_retries=0)
        messages: Any = [{"role": "user", "content": "go"}]
        with client, ThreadPoolExecutor(4) as pool:

            def by_openai() -> str:
                chunks = client.chat.completions.create(model="a", messages=messages, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

            def by_ollama() -> str:
                patient = ollama.Client(host=router.url, timeout=1.5)
                try:
                    return "".join(part.message.content or "" for part in patient.chat("a", messages, stream=True))
                finally:
                    patient._client.close()

            def by_anthropic() -> str:
                patient = anthropic.Anthropic(base_url=router.url, api_key="x", timeout=1.5, max_retries=0)
                with patient, patient.messages.stream(model="a", max_tokens=10, messages=messages) as stream:
                    return stream.get_final_text()

            def by_responses() -> str:
                with client.responses.stream(model="a", input="go") as stream:
                    return stream.get_final_response().output_text

            answers = [pool.submit(ask) for ask in (by_openai, by_ollama, by_anthropic, by_responses)]
            assert {future.result(30) for future in answers} == {"a:latest-1 a:latest-2 a:latest-3 "}


@pytest.mark.req("R19")
def test_a_sign_of_life_is_a_comment_or_an_empty_object_and_an_error_after_it_is_told_in_the_stream(
    home: Path,
) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"load_seconds": 1.0, "fail_load": "broken"}}
    with running_router(home, *fake_config(home, scripts, heartbeat_seconds=0.2)) as router:
        body = {"model": "a", "prompt": "go", "messages": [{"role": "user", "content": "go"}], "stream": True}
        sse = call(router, "POST", "/v1/chat/completions", body)
        assert sse.status == 200, "the sign of life has committed it"
        assert sse.body.count(b": waiting\n\n") >= 3
        assert sse.body.endswith(b'"code":"load_failed"}}\n\n')
        router.wait_state("a", "backoff")
        call(router, "POST", "/admin/models/a/unload")
        lines = call(router, "POST", "/api/chat", body).lines()
        assert len(lines) >= 3
        for line in lines[:-1]:
            assert (line["message"], line["done"]) == ({"role": "assistant", "content": ""}, False)
        assert lines[-1] == {"error": "broken"}
        router.wait_state("a", "backoff")
        call(router, "POST", "/admin/models/a/unload")
        messages = call(router, "POST", "/v1/messages", {**body, "max_tokens": 5})
        assert messages.body.count(b'event: ping\ndata: {"type":"ping"}\n\n') >= 3
        assert messages.body.endswith(
            b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"broken"}}\n\n'
        )
        router.wait_state("a", "backoff")
        call(router, "POST", "/admin/models/a/unload")
        responses = call(router, "POST", "/v1/responses", {"model": "a", "input": "go", "stream": True})
        assert responses.body.startswith(b"event: response.created\n")
        assert responses.body.count(b": waiting\n\n") >= 3
        (failed,) = [frame for frame in read_frames(responses.body) if frame.event == "response.failed"]
        assert failed.data["response"]["error"] == {"code": "server_error", "message": "broken"}


def test_a_load_that_is_quick_gets_no_sign_of_life_and_its_errors_their_status(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"fail_load": "broken"}})) as router:
        reply = call(router, "POST", "/v1/completions", {"model": "a", "prompt": "go", "stream": True})
        assert reply.status == 500


@pytest.mark.req("R17", "R19")
def test_stages_of_a_load_are_seen_in_status_and_events(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {
        "a": {"tokens": 100_000, "tokens_per_second": 50},
        "b": {"load_seconds": 1.0, "warm_up_seconds": 0.5, "tokens": 2},
    }
    with (
        running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        events = EventStream(router)
        holding = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(holding)
        answer = pool.submit(router.generate, "b")
        assert router.wait_state("b", "queued")["stage"] == "waiting for a:latest to leave"
        assert router.wait_state("a", "draining")["reason"] == "evicted for b:latest"
        holding.close()
        stages: list[str] = []

        def watch() -> bool:
            entry = router.model("b")
            if entry["stage"] and entry["stage"] not in stages:
                stages.append(entry["stage"])
            if entry["stage"] == "weights":
                assert 0 <= entry["fraction"] <= 1
            return bool(entry["state"] == "ready")

        wait_until(watch, "b is ready")
        assert answer.result(20)["done"] is True
        assert stages[-2:] == ["weights", "warm_up"]
        wait_until(lambda: len(events.of("request_ended")) == 2, "both requests have ended")
        moves = [(e["old"], e["new"]) for e in events.of("state") if e["model"] == "b:latest"]
        assert moves == [("unloaded", "queued"), ("queued", "starting"), ("starting", "loading"), ("loading", "ready")]
        fractions = [
            e["fraction"] for e in events.of("loading") if e["stage"] == "weights" and e["model"] == "b:latest"
        ]
        assert len(fractions) > 3
        assert fractions == sorted(fractions)
        (loaded,) = [e for e in events.of("loaded") if e["model"] == "b:latest"]
        assert [eviction["model"] for eviction in loaded["evictions"]] == ["a:latest"]
        last = events.seen[-1][0]
        again = EventStream(router, last - 3)
        wait_until(lambda: len(again.seen) >= 3, "what was missed is told again")
        assert [number for number, _, _ in again.seen[:3]] == [last - 2, last - 1, last]
        router.process.terminate()
        events.close()
        again.close()


@pytest.mark.req("R16")
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ({"fail_warm_up": "kernels are on strike"}, "warm_up_failed .*kernels are on strike"),
        ({"hang_at": "warm_up"}, "warm_up_left"),
    ],
)
def test_a_warm_up_that_fails_or_hangs_costs_nothing_but_a_warning(
    home: Path, script: dict[str, Any], line: str
) -> None:
    arguments = fake_config(home, {"a": {"tokens": 2, **script}}, warm_up_timeout_seconds=0.4)
    with running_router(home, *arguments) as router:
        assert router.generate("a")["done"] is True
        router.wait_line(line)
        assert router.model("a")["state"] == "ready"


@pytest.mark.req("R19")
def test_a_request_that_is_not_streamed_is_refused_when_the_load_takes_longer_than_it_waits(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 1.5, "tokens": 2}})) as router:
        router.generate("a")
        call(router, "POST", "/admin/models/a/unload")
        reply = call(router, "POST", "/api/generate", {"model": "a", "prompt": "go", "stream": False},
                     X_Deadline_Seconds="0.5")  # fmt: skip
        assert reply.status == 503
        assert reply.headers["retry-after"] == "2"
        assert router.model("a")["state"] == "unloaded", "nothing was loaded for it"


@pytest.mark.req("R11", "R45")
def test_a_load_that_burns_a_core_leaves_the_others_served(home: Path) -> None:
    """Everything is answered while the load goes on; how quickly is measured by the benchmark."""
    scripts: dict[str, dict[str, Any]] = {"a": {"load_seconds": 3.0, "burn": True, "tokens": 2}, "b": {"tokens": 2}}
    with running_router(home, *fake_config(home, scripts)) as router, ThreadPoolExecutor(1) as pool:
        router.generate("b")
        pid = router.model("b")["pid"]
        loading = pool.submit(router.generate, "a")
        router.wait_state("a", "loading")
        for _ in range(30):
            assert router.generate("b")["response"] == "b:latest-1 b:latest-2 "
            assert router.client.get("/health")["status"] == "ok"
        assert router.model("a")["state"] == "loading", "all of that while it was loading"
        assert loading.result(20)["done"] is True
        assert router.model("b")["pid"] == pid
        assert router.model("b")["loads"] == 1


@pytest.mark.req("R45")
def test_a_load_yields_to_those_who_answer_and_to_nobody_else(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {"busy": {"tokens": 100_000, "tokens_per_second": 50}, "b": {}, "c": {}}
    with running_router(home, *fake_config(home, scripts)) as router:
        router.generate("b")
        assert router.model("b")["last_swap"]["yielded"] is False
        stream = router.client.stream("/api/generate", {"model": "busy", "prompt": "go"})
        next(stream)
        router.generate("c")
        assert router.model("c")["last_swap"]["yielded"] is True
        stream.close()
