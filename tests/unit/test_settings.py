"""One table, four layers, and an error that names its origin."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlx_router_server.durations import parse_duration
from mlx_router_server.settings import Settings, describe_model_settings, describe_settings, shown_settings
from mlx_router_server.settings_layers import SettingsError, json_schema, load_settings
from mlx_router_shared.errors import InvalidRequest


def _load(tmp_path: Path, text: str = "", **environment: str) -> Settings:
    (tmp_path / "config.toml").write_text(text)
    return load_settings({}, {"MLX_ROUTER_HOME": str(tmp_path), **environment})


@pytest.mark.req("R20")
def test_each_layer_covers_the_one_below(tmp_path: Path) -> None:
    assert _load(tmp_path).max_queue == 512
    assert _load(tmp_path, "max_queue = 1").max_queue == 1
    assert _load(tmp_path, "max_queue = 1", OLLAMA_MAX_QUEUE="2").max_queue == 2
    environment = {"MLX_ROUTER_HOME": str(tmp_path), "OLLAMA_MAX_QUEUE": "2", "MLX_ROUTER_MAX_QUEUE": "3"}
    assert load_settings({}, environment).max_queue == 3
    assert load_settings({"max_queue": "4"}, environment).max_queue == 4


@pytest.mark.req("R20")
def test_each_value_remembers_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("max_queue = 1\nkeep_alive = '1m'\nport = 5")
    environment = {"MLX_ROUTER_HOME": str(tmp_path), "OLLAMA_KEEP_ALIVE": "2m", "MLX_ROUTER_PORT": "6"}
    settings = load_settings({"parallel": "3"}, environment)
    assert settings.origins["max_queue"] == str(tmp_path / "config.toml")
    assert (settings.origins["keep_alive"], settings.keep_alive) == ("OLLAMA_KEEP_ALIVE", 120)
    assert settings.origins["port"] == "MLX_ROUTER_PORT"
    assert settings.origins["parallel"] == "--parallel"
    assert "strict" not in settings.origins


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    settings = _load(tmp_path, "api_keys = ['very-secret']")
    assert "very-secret" not in json.dumps(shown_settings(settings))
    with pytest.raises(SettingsError, match="api_keys") as caught:
        _load(tmp_path, "api_keys = {very-secret = 1}")
    assert "very-secret" not in str(caught.value)


def test_the_schema_knows_every_key_and_every_default() -> None:
    properties = json_schema()["properties"]
    shown = shown_settings(Settings())
    assert set(properties) == {"version", *shown}
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    for name, value in shown.items():
        kind = properties[name]["type"]
        kinds = {kind} if isinstance(kind, str) else set(kind)
        assert names[type(value)] in kinds or (isinstance(value, int) and "number" in kinds), name
        assert properties[name]["description"].endswith(".")
    models = properties["models"]["additionalProperties"]["properties"]
    assert set(models) == {field.name for field in describe_model_settings()}


@pytest.mark.parametrize("name", ["ports", "max_que", "model"])
def test_a_misspelt_setting_is_told_with_what_may_have_been_meant(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="did you mean"):
        _load(tmp_path, f"{name} = 1")


@pytest.mark.parametrize("field", describe_settings(), ids=lambda field: field.name)
def test_every_setting_reads_its_own_default_and_refuses_nonsense(field: Any, tmp_path: Path) -> None:
    assert field.metadata["help"].endswith(".")
    default = field.default
    if not isinstance(default, tuple):
        assert field.metadata["parse"](default) == default
    with pytest.raises(SettingsError, match="--" + field.name.replace("_", "-")):
        load_settings({field.name: object()}, {"MLX_ROUTER_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_queue = -1", "max_queue"),
        ("colour = 'red'", "there is no setting 'colour'"),
        ("port = 70000", "not a port"),
        ("[models.x]\ncolour = 1", "there is no setting 'colour' of a model"),
        ("[models.x]\ndraft_model = 1", "draft_model.*not text"),
        ("[models.x]\noptions = { temperature = 'hot' }", "must be of type float32"),
        ("[models.x]\nkind = 'robot'", "not one of"),
        ("[models.'my model']", "models.'my model': 'my model': invalid model name"),
        ("[models.x]\naliases = ['gpt 4']", "aliases: 'gpt 4': invalid model name"),
        ("[model_aliases]\n'a b' = 'org/x'", "model_aliases.'a b': 'a b': invalid model name"),
        ("[model_aliases]\nx = 'org/x/y/z'", "model_aliases.'x': 'org/x/y/z': invalid model name"),
        ("[name_map]\n'claude-*' = 'no name'", r"name_map.'claude-\*': 'no name': invalid model name"),
        ("version = 9", "version 9 is not known"),
        ("port =", "config.toml"),
    ],
)
def test_a_bad_file_is_refused_by_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("0.0.0.0", ("0.0.0.0", 11434)),
        (":8080", ("0.0.0.0", 8080)),
        ("http://example.local", ("example.local", 80)),
        ("example.local:99", ("example.local", 99)),
        ("[::1]:5", ("::1", 5)),
        ("::1", ("::1", 11434)),
        ('"127.0.0.1:1/path"', ("127.0.0.1", 1)),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(tmp_path: Path, host: str, expected: tuple[str, int]) -> None:
    settings = _load(tmp_path, OLLAMA_HOST=host)
    assert (settings.host, settings.port) == expected


@pytest.mark.parametrize("source", ["config.toml", "MLX_ROUTER_HOST", "OLLAMA_HOST", "--host"])
@pytest.mark.parametrize("host", ["a b", "[::1", "x@y", "-a", "::g", "ü.example", "a b:c"])
def test_a_host_that_is_none_is_refused_wherever_it_is_set(tmp_path: Path, host: str, source: str) -> None:
    text = f"host = '{host}'" if source == "config.toml" else ""
    (tmp_path / "config.toml").write_text(text)
    environment = {"MLX_ROUTER_HOME": str(tmp_path)} | ({source: host} if source.isupper() else {})
    with pytest.raises(SettingsError, match=rf"{source}.*neither a host name nor an IP address"):
        load_settings({"host": host} if source == "--host" else {}, environment)


def test_a_host_has_no_port_and_no_scheme(tmp_path: Path) -> None:
    for host in ("127.0.0.1:99", "http://localhost", "localhost/path"):
        with pytest.raises(SettingsError, match="neither a host name nor an IP address"):
            _load(tmp_path, MLX_ROUTER_HOST=host)


@pytest.mark.parametrize(
    "host", ["localhost", "my_mac.local", "127.0.0.1", "::1", "[::1]", "fe80::1%en0", "example.org.", ""]
)
def test_hosts(tmp_path: Path, host: str) -> None:
    settings = _load(tmp_path, MLX_ROUTER_HOST=host)
    assert settings.host == host.strip("[]")
    assert urlsplit(settings.url).hostname


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("10s", 10), ("10", 10), ("-1", math.inf), ("0", 0), ("1h30m", 5400)],
)
def test_ollama_keep_alive(tmp_path: Path, value: str, seconds: float) -> None:
    assert _load(tmp_path, OLLAMA_KEEP_ALIVE=value).keep_alive == seconds


def test_sizes_and_models(tmp_path: Path) -> None:
    settings = _load(
        tmp_path, 'memory_budget = "12GiB"\n[models."org/x"]\npath = "/m/x"\nkeep_alive = "-1"\npinned = true'
    )
    assert settings.memory_budget == 12 * 2**30
    assert settings.models["org/x"].path == Path("/m/x")
    assert settings.models["org/x"].keep_alive == math.inf


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5m", 300), (300, 300), (300.5, 300.5), ("1h2m3s", 3723), (-1, math.inf), ("-1m", math.inf), (0, 0), ("0", 0),
     ("0s", 0), ("1.5h", 5400), ("100ms", 0.1), (10**400, math.inf), (math.nan, math.inf), ("9" * 400 + "s", math.inf)],
)  # fmt: skip
def test_keep_alive_in_all_its_forms(value: object, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("", 'time: invalid duration ""'),
        ("abc", 'time: invalid duration "abc"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        (True, "Unsupported type: 'bool'"),
        ([], r"Unsupported type: '\[\]interface"),
    ],
)
def test_keep_alive_refused_in_ollamas_words(value: object, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        parse_duration(value)


def test_a_duration_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for text in (
        "keep_alive = nan",
        "keep_alive = 'nan'",
        "drain_timeout_seconds = nan",
        "drain_timeout_seconds = inf",
    ):
        with pytest.raises(SettingsError, match=r"config\.toml"):
            _load(tmp_path, text)
