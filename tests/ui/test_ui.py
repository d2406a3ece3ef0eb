"""What a visitor of ``/ui`` sees and does, in headless Chromium, with real models and real processes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from mlx_router_server.access.keys import Scope, keys_file, make_key, write_keys
from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.fakes import fake_config, write_fake
from tests.support.hub import running_hub
from tests.support.router import RouterProcess, running_router, wait_until, write_config
from tests.tiny_models.script import GREETING, LONG_STORY, WEATHER_TOOL

_SHOTS = os.environ.get("MLX_ROUTER_SHOTS", "")
"""A folder for pictures of the page; nothing is taken without one."""
_DEADLINE = 30_000  # milliseconds, as Playwright counts: a cold load on a busy machine takes five seconds
expect.set_options(timeout=_DEADLINE)
_MB = 1_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "these tests need Debian's chromium: .ci/chromium installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update"],
        )  # fmt: skip
        yield found
        found.close()


class _Visit:
    """One open page; what it says on its console, and where it goes, is looked at when it is left."""

    def __init__(self, page: Page, router: RouterProcess) -> None:
        self.page = page
        self.router = router
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(_DEADLINE)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url.removeprefix("blob:")).netloc))
        page.goto(router.url + "/ui")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def row(self, name: str) -> Any:
        return self.page.locator(f'tr[data-model="{name}:latest"]')

    def state(self, name: str, word: str) -> None:
        expect(self.row(name).locator(".state")).to_have_text(re.compile(f"^{word}"))

    def measured(self) -> int:
        return int(self.page.locator("#memory-bar").get_attribute("data-measured") or 0)

    def ask(self, text: str) -> Any:
        """Type and send; the turn that answers."""
        before = self.page.locator(".turn.assistant").count()
        self.page.fill("#chat-text", text)
        self.page.press("#chat-text", "Enter")
        return self.page.locator(".turn.assistant").nth(before)

    def check_accessible(self, what: str) -> None:
        found = Axe().run(self.page).response["violations"]
        serious = [
            (finding["id"], [node["target"] for node in finding["nodes"]])
            for finding in found
            if finding["impact"] in ("serious", "critical")
        ]
        assert serious == [], what

    def shoot(self, name: str) -> None:
        if _SHOTS:
            self.page.screenshot(path=str(Path(_SHOTS) / f"{name}.png"), full_page=True)


@contextmanager
def _visit(browser: Browser, router: RouterProcess, **how: Any) -> Iterator[_Visit]:
    context = browser.new_context(**how)
    visit = _Visit(context.new_page(), router)
    try:
        yield visit
        assert visit.errors == [], "nothing is wrong on the console"
        assert visit.hosts == {urlsplit(router.url).netloc}, "nothing is asked of anybody else"
    finally:
        context.close()


def _wait(condition: Callable[[], Any], visit: _Visit, what: str) -> Any:
    """Let the page go on meanwhile."""

    def look() -> Any:
        visit.page.wait_for_timeout(20)
        return condition()

    return wait_until(look, what)


def test_a_model_is_loaded_asked_and_unloaded(browser: Browser, home: Path) -> None:
    """Its memory is seen to rise and to fall, and its answer to grow."""
    with running_router(home) as router, _visit(browser, router) as visit:
        visit.state("demo", "unloaded")
        visit.row("demo").get_by_role("button", name="Load demo:latest").click()
        visit.state("demo", "ready")
        held = _wait(visit.measured, visit, "memory of the model")
        assert held > 20 * _MB
        answer = visit.ask("Tell me a long story.")
        words = answer.locator(".words")
        lengths: set[int] = set()

        def grown() -> bool:
            lengths.add(len(words.text_content() or ""))
            return (words.text_content() or "") == LONG_STORY

        _wait(grown, visit, "the whole story")
        assert len(lengths - {0}) > 3, "it was seen to grow"
        expect(answer.locator(".who").last).to_have_text(re.compile(r"tokens in, \d+ out, \d+ tokens/s, stop"))
        expect(visit.page.locator("#ended li").first).to_contain_text("demo:latest: ok")
        expect(visit.page.locator("#swap-rows li").first).to_contain_text("demo:latest came in")
        expect(visit.page.locator("#log-lines")).to_contain_text("event=loaded model='demo:latest'")
        visit.row("demo").get_by_role("button", name="Unload demo:latest").click()
        visit.state("demo", "unloaded")
        _wait(lambda: visit.measured() == 0, visit, "the memory is back")
        expect(visit.page.locator("#swap-rows li").first).to_contain_text("unloaded by the operator")


def test_thinking_is_folded_calls_are_shown_and_an_answer_can_be_stopped(browser: Browser, home: Path) -> None:
    slow = write_fake(home / "slow", tokens=100_000, tokens_per_second=30)
    config = write_config(home, {"slow": {"path": str(slow)}}, standby_workers=0)
    with running_router(home, "--config", str(config)) as router, _visit(browser, router) as visit:
        page = visit.page
        page.select_option("#chat-model", "demo:latest")
        page.check("#chat-think")
        answer = visit.ask("What is 17 + 25?")
        expect(answer.locator(".words")).to_have_text("17 + 25 = 42.")
        expect(answer.locator("details pre")).not_to_be_visible()
        answer.locator("summary").click()
        expect(answer.locator("details pre")).to_contain_text("17 + 20 is 37")
        page.click("#chat-clear")
        page.uncheck("#chat-think")
        page.locator("#chat-form summary").click()
        page.fill("#chat-tools", json.dumps([WEATHER_TOOL]))
        answer = visit.ask("What is the weather in Paris?")
        expect(answer.locator(".call")).to_have_text('calls get_weather({"city":"Paris","unit":"celsius"})')
        page.fill("#chat-tools", "no JSON")
        page.fill("#chat-text", "Hello!")
        page.press("#chat-text", "Enter")
        expect(page.locator(".turn.failed")).to_contain_text("not JSON")
        page.fill("#chat-tools", "")
        page.click("#chat-clear")
        page.select_option("#chat-model", "slow:latest")
        answer = visit.ask("go")
        _wait(lambda: len(answer.locator(".words").text_content() or "") > 20, visit, "it answers")
        assert router.model("slow")["in_flight"] == 1
        # A new conversation does not begin with what was left of the former one.
        page.click("#chat-clear")
        wait_until(lambda: router.model("slow")["in_flight"] == 0, "the worker was told")
        expect(page.locator("#chat-send")).to_be_enabled()
        with page.expect_request("**/api/chat") as asked:
            answer = visit.ask("go on")
        assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["go on"]
        _wait(lambda: len(answer.locator(".words").text_content() or "") > 20, visit, "it answers again")
        page.click("#chat-stop")
        expect(answer).to_contain_text("stopped")
        wait_until(lambda: router.model("slow")["in_flight"] == 0, "the worker was told")
        expect(page.locator("#chat-send")).to_be_enabled()


def test_a_picture_goes_along_where_the_model_sees(browser: Browser, home: Path) -> None:
    picture = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    )
    config = fake_config(home, {"sees": {"capabilities": ["completion", "vision"], "text": "a dot"}}, demo_model=True)
    with running_router(home, *config) as router, _visit(browser, router) as visit:
        page = visit.page
        page.select_option("#chat-model", "demo:latest")
        expect(page.locator("#chat-image-label")).to_be_hidden()
        page.select_option("#chat-model", "sees:latest")
        expect(page.locator("#chat-image-label")).to_be_visible()
        page.set_input_files("#chat-image", {"name": "dot.png", "mimeType": "image/png", "buffer": picture})
        with page.expect_request("**/api/chat") as asked:
            answer = visit.ask("What is this?")
        (message,) = asked.value.post_data_json["messages"]
        assert [base64.b64decode(image) for image in message["images"]] == [picture]
        expect(answer.locator(".words")).to_have_text("a dot ")
        expect(page.get_by_alt_text("dot.png")).to_be_visible()


def test_a_swap_is_followed_live(browser: Browser, home: Path) -> None:
    scripts = {name: {"memory_bytes": 3 * _MB, "load_seconds": 1.5} for name in ("a", "b")}
    arguments = fake_config(home, scripts, memory_budget=4 * _MB)
    with running_router(home, *arguments) as router, _visit(browser, router) as visit:
        visit.row("a").get_by_role("button", name="Load a:latest").click()
        visit.state("a", "loading")
        visit.state("a", "ready")
        visit.row("b").get_by_role("button", name="Plan for b:latest").click()
        expect(visit.page.locator("#plan-dialog")).to_contain_text(
            "loaded once others have left (the room of others is needed)"
        )
        expect(visit.page.locator("#plan-facts")).to_contain_text("a:latest, 3.0 MB")
        visit.check_accessible("with a dialog")
        visit.page.keyboard.press("Escape")
        visit.row("b").get_by_role("button", name="Load b:latest").click()
        visit.state("a", "unloaded")
        visit.state("b", "loading")
        visit.state("b", "ready")
        swaps = visit.page.locator("#swap-rows li")
        expect(swaps.nth(0)).to_contain_text("b:latest came in")
        expect(swaps.nth(1)).to_contain_text("a:latest left in")
        expect(swaps.nth(1)).to_contain_text("evicted for b:latest")
        label = swaps.nth(0).get_by_role("img").get_attribute("aria-label") or ""
        stages = [part.split()[0] for part in label.split(", ")]
        assert "start" in stages
        assert len(set(stages)) == len(stages), "each stage once"
        visit.row("b").get_by_role("button", name="Pin b:latest").click()
        expect(visit.row("b")).to_contain_text("pinned")


def test_a_restart_of_the_router_is_survived(browser: Browser, home: Path) -> None:
    with running_router(home) as router:
        port = str(urlsplit(router.url).port)
        context = browser.new_context()
        visit = _Visit(context.new_page(), router)
        visit.row("demo").get_by_role("button", name="Load demo:latest").click()
        visit.state("demo", "ready")
        assert visit.errors == []
    expect(visit.page.locator("#connection")).to_have_text("the router does not answer; trying again")
    with running_router(home, "--port", port) as router:
        expect(visit.page.locator("#connection")).to_have_text("connected")
        visit.state("demo", "unloaded")
        expect(visit.ask("Hello!").locator(".words")).to_have_text(GREETING)
        expect(visit.page.locator("#ended li").first).to_contain_text("demo:latest: ok")
        assert all("net::ERR" in error for error in visit.errors), visit.errors
        context.close()


def test_a_key_is_asked_for_and_used(browser: Browser, home: Path) -> None:
    secret, stored = make_key("page", [Scope.ADMIN, Scope.INFERENCE], ())
    write_keys(keys_file(home), [stored])
    with running_router(home) as router:
        context = browser.new_context()
        visit = _Visit(context.new_page(), router)
        expect(visit.page.locator("#key-dialog")).to_be_visible()
        visit.page.fill("#key-input", "wrong")
        expect(visit.page.locator("#key-error")).to_be_hidden()
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator("#key-error")).to_have_text("The server does not know this key.")
        visit.page.fill("#key-input", secret)
        visit.page.keyboard.press("Enter")
        visit.state("demo", "unloaded")
        expect(visit.ask("Hello!").locator(".words")).to_have_text(GREETING)
        assert all("401" in error for error in visit.errors), visit.errors
        context.close()


def test_what_others_write_is_shown_and_never_run(browser: Browser, home: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    config = fake_config(home, {"echo": {"text": evil}})
    with running_router(home, *config) as router, _visit(browser, router) as visit:
        answer = visit.ask(evil)
        expect(answer.locator(".words")).to_have_text(re.compile("<b>bold</b>"))
        router.client.text("/nobody?" + "<b>x</b>")
        expect(visit.page.locator(".turn.user p").last).to_have_text(evil)
        assert visit.page.locator("#chat-log b, #chat-log img, #log-lines b").count() == 0
        assert visit.page.title() == "mlx-router"


def test_a_download_is_seen_to_get_on(browser: Browser, home: Path) -> None:
    repository = "mlx-community/House-0.4M"
    with running_hub() as hub:
        hub.add_folder(repository, DEMO_FOLDER)
        with (
            running_router(home, variables={"HF_ENDPOINT": hub.url}) as router,
            _visit(browser, router) as visit,
        ):
            visit.page.fill("#pull-name", repository)
            visit.page.press("#pull-name", "Enter")
            expect(visit.page.locator("#pulls li").first).to_have_text(f"{repository}: success")
            expect(visit.page.locator(f'tr[data-model="{repository}:latest"]')).to_be_visible()
            visit.page.fill("#pull-name", "mlx-community/Nobody")
            visit.page.press("#pull-name", "Enter")
            expect(visit.page.locator("#pulls .bad")).to_contain_text("mlx-community/Nobody: ")


def test_a_download_that_breaks_off_is_told(browser: Browser, home: Path) -> None:
    """A proxy may end an answer in good order long before its end."""
    line = '{"status":"pulling 0123","digest":"sha256:0123","total":4000000,"completed":1200000}\n'
    with running_router(home) as router, _visit(browser, router) as visit:
        visit.page.route("**/api/pull", lambda route: route.fulfill(body=line, content_type="application/x-ndjson"))
        visit.page.fill("#pull-name", "org/name")
        visit.page.press("#pull-name", "Enter")
        expect(visit.page.locator("#pulls .bad")).to_have_text(re.compile("org/name: the connection broke off"))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_it_can_be_used_by_everybody(browser: Browser, home: Path, scheme: Any, width: int) -> None:
    """axe finds nothing serious; the keyboard is enough; a phone need not scroll sideways."""
    fakes = {name: {"memory_bytes": size * _MB, "load_seconds": 0.2, "tokens": 60, "tokens_per_second": 60}
             for name, size in (("qwen3-8b", 500), ("gemma3-4b", 300), ("llama3.2-3b", 200))}  # fmt: skip
    models = {name: {"path": str(write_fake(home / name, **script))} for name, script in fakes.items()}
    broken = {"path": str(write_fake(home / "broken", fail_load="its weights cannot be read"))}
    config = write_config(home, {**models, "broken": broken}, standby_workers=0, memory_budget=900 * _MB)
    how = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with running_router(home, "--config", str(config)) as router, _visit(browser, router, **how) as visit:
        page = visit.page
        visit.state("demo", "unloaded")
        visit.check_accessible("at rest")
        router.client.post("/admin/models/qwen3-8b/pin")
        for name in ("gemma3-4b", "qwen3-8b", "llama3.2-3b"):
            router.generate(name)
        visit.row("demo").get_by_role("button", name="Load demo:latest").focus()
        page.keyboard.press("Enter")
        visit.state("demo", "ready")
        page.select_option("#chat-model", "demo:latest")
        page.check("#chat-think")
        answer = visit.ask("What is 17 + 25?")
        expect(answer.locator(".words")).to_have_text("17 + 25 = 42.")
        expect(page.locator("#swap-rows li")).to_have_count(5)
        visit.check_accessible("in use")
        assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
        assert page.evaluate("document.activeElement.id") == "chat-text"
        seen = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
        assert {"Load broken:latest", "Pin demo:latest", "filter", "pull-name", "log-filter", "Conversation"} <= seen
        page.evaluate("window.scrollTo(0, 0)")
        visit.shoot(f"ui-{'phone' if width < 500 else scheme}")


def test_a_failed_load_says_why(browser: Browser, home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {
        "broken": {"fail_load": "its weights cannot be read"},
        "big": {"memory_bytes": 50 * _MB},
    }
    with (
        running_router(home, *fake_config(home, scripts, memory_budget=10 * _MB)) as router,
        _visit_with_errors(browser, router) as visit,
    ):
        visit.row("broken").get_by_role("button", name="Load broken:latest").click()
        expect(visit.row("broken").locator(".why")).to_contain_text("its weights cannot be read")
        visit.state("broken", "backoff")
        visit.row("big").get_by_role("button", name="Load big:latest").click()
        expect(visit.row("big").locator(".why")).to_contain_text("50 MB")


@contextmanager
def _visit_with_errors(browser: Browser, router: RouterProcess) -> Iterator[_Visit]:
    """Chromium itself writes every answer with a status of 500 to the console."""
    context = browser.new_context()
    visit = _Visit(context.new_page(), router)
    yield visit
    assert all("status of 5" in error for error in visit.errors), visit.errors
    context.close()
