"""Model folders that want to do harm: nothing of them is run, nothing outside is read, and the others stay served."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from tests.support.http import call
from tests.support.router import running_router
from tests.unit.test_catalogue import write_model

_GOOD: dict[str, Any] = {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "max_position_embeddings": 4096}  # fmt: skip
_ODD: list[Any] = [None, True, -1, 0, 10**30, 1e308, "x", [], {}, [[[]]], {"a": {"b": []}}]


@pytest.mark.req("R27", "R28", "R32")
@pytest.mark.parametrize("key", [*_GOOD, "text_config", "quantization", "quantization_config", "architectures",
                                 "vision_config", "layer_types", "sliding_window", "rope_scaling"])  # fmt: skip
@pytest.mark.parametrize("value", _ODD, ids=str)
def test_wrong_values_in_a_configuration_are_a_reason_or_nothing(tmp_path: Path, key: str, value: Any) -> None:
    """And what is made of them can be told to a client."""
    import msgspec

    folder = write_model(tmp_path / "m", {**_GOOD, key: value})
    try:
        files = inspect_folder(folder)
    except NotServable:
        return
    assert msgspec.json.encode([files.info, files.context_tokens, files.cache.bytes_for(8192), files.parameters])
    assert files.context_tokens < 2**53


@pytest.mark.req("R28", "R52")
@pytest.mark.parametrize("where", ["config", "text_config"])
def test_more_layers_than_any_model_has_are_refused_and_not_counted_out(tmp_path: Path, where: str) -> None:
    layers = {"num_hidden_layers": 2**39}
    config = {**_GOOD, **layers} if where == "config" else {**_GOOD, "text_config": {**_GOOD, **layers}}
    with pytest.raises(NotServable, match="more layers"):
        inspect_folder(write_model(tmp_path / "m", config))


@pytest.mark.req("R28", "R32")
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json",
                                  "chat_template.json", "1_Pooling/config.json", "model.safetensors.index.json",
                                  "adapter_config.json", "preprocessor_config.json"])  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"null", b"5", b'"x"', b"[]", b"{}",
     b'{"model_type": 5, "chat_template": {"a": 1}, "added_tokens": 5, "added_tokens_decoder": [], "weight_map": 7}',
     b'{"chat_template": [1, {"name": "default"}], "added_tokens": [5, {"content": 7}], "temperature": "hot"}',
     b'{"weight_map": {"a": "../../../etc/passwd", "b": 5}}', b'{"a": 1e999, "b": NaN}', b" " * (33 * 2**20)],
    ids=range(14),
)  # fmt: skip
def test_hostile_json_beside_good_weights(tmp_path: Path, file: str, content: bytes) -> None:
    folder = write_model(tmp_path / "m")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    reason = ""
    try:
        inspect_folder(folder)
    except NotServable as error:
        reason = str(error)
    assert len(reason) < 500
    assert "passwd" not in reason or "missing" in reason


@pytest.mark.req("R32")
def test_links_that_lead_out_are_not_followed(home: Path, tmp_path: Path) -> None:
    """Neither a folder, nor a single file of a model that is otherwise in order."""
    models, secret = tmp_path / "models", tmp_path / "secret"
    secret.write_text("the secret of somebody")
    outside = tmp_path / "outside"
    shutil.copytree(DEMO_FOLDER, outside)
    shutil.copytree(DEMO_FOLDER, models / "good")
    (models / "folder").symlink_to(outside)
    for name, file, target in (
        ("licence", "LICENSE", secret), ("weights", "model.safetensors", outside / "model.safetensors"),
        ("loop", "LICENSE", models / "loop" / "LICENSE"),
    ):  # fmt: skip
        shutil.copytree(DEMO_FOLDER, models / name)
        (models / name / file).unlink(missing_ok=True)
        (models / name / file).symlink_to(target)
    os.symlink(models / "good" / "model.safetensors", models / "good" / "copy-of-it")
    with running_router(home, "--models-dir", str(models)) as router:
        names = {model["name"] for model in router.client.get("/api/tags")["models"]}
        assert names == {"demo:latest", "good:latest"}
        told = router.status()["router"]["unservable"]
        assert {"licence", "weights", "loop"} <= set(told)
        for name in ("licence", "weights", "folder", "loop"):
            reply = call(router, "POST", "/api/show", {"model": name})
            assert (reply.status, b"secret" in reply.body) == (404, False)


@pytest.mark.req("R33")
def test_code_of_a_repository_is_never_run(home: Path, tmp_path: Path) -> None:
    """A modelling file, a tokenizer of its own, weights that are a pickle: refused, or loaded without them."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').write('it ran')\nclass Tokenizer:\n    pass\n"
    models = tmp_path / "models"
    for name in ("modelling", "tokenizer", "pickle", "setup"):
        shutil.copytree(DEMO_FOLDER, models / name)
        for file in (
            "modeling_demo.py",
            "tokenization_demo.py",
            "setup.py",
            "sitecustomize.py",
            "conftest.py",
            "queue.py",
        ):
            (models / name / file).write_text(code)
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    (models / "modelling" / "config.json").write_text(
        json.dumps({**config, "model_file": "modeling_demo.py", "auto_map": {"AutoModel": "modeling_demo.Tokenizer"}})
    )
    said = json.loads((DEMO_FOLDER / "tokenizer_config.json").read_text())
    said |= {"auto_map": {"AutoTokenizer": ["tokenization_demo.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (models / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(said))
    (models / "pickle" / "model.safetensors").rename(models / "pickle" / "pytorch_model.bin")
    # On a machine without any network: offline, and with an address where nobody is.
    with running_router(home, "--models-dir", str(models), variables={"HF_ENDPOINT": "http://127.0.0.1:9"}) as router:
        names = {model["name"] for model in router.client.get("/api/tags")["models"]}
        assert not names & {"modelling:latest", "pickle:latest"}
        reply = call(router, "POST", "/api/generate", {"model": "tokenizer", "prompt": "Hello!", "stream": False})
        assert reply.status in (200, 500), reply.body
        assert (
            call(router, "POST", "/api/generate", {"model": "setup", "prompt": "Hello!", "stream": False}).status == 200
        )
        assert not ran.exists()
        worker = psutil.Process(router.model("setup")["pid"])
        assert os.getpgid(worker.pid) == worker.pid, "a process group of its own"
        environment = worker.environ()
        assert (environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]) == ("1", "1")
        assert not [name for name in environment if "TOKEN" in name and name != "TOKENIZERS_PARALLELISM"]
        assert not [name for name in environment if name.startswith(("HF_ENDPOINT", "MLX_ROUTER", "AWS_", "OPENAI"))]


@pytest.mark.slow
@pytest.mark.req("R28", "R52")
def test_a_tokenizer_that_is_a_trap_fails_its_own_load_only(home: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    traps = {
        "empty": b"", "nested": b'{"model":' + b"[" * 50_000, "wrong": b'{"model": {"type": "BPE", "vocab": 5}}',
        "types": b'{"version": 1, "added_tokens": {"a": 1}, "model": []}',
    }  # fmt: skip
    for name, content in traps.items():
        shutil.copytree(DEMO_FOLDER, models / name)
        (models / name / "tokenizer.json").write_bytes(content)
    with running_router(home, "--models-dir", str(models)) as router:
        memory = psutil.Process(router.pid).memory_info().rss
        for name in traps:
            reply = call(router, "POST", "/api/generate", {"model": name, "prompt": "x", "stream": False})
            assert reply.status in (404, 500), (name, reply.body)
            assert str(tmp_path) not in reply.body.decode()
        assert router.generate("demo", prompt="Hello!")["done"]
        assert psutil.Process(router.pid).memory_info().rss - memory < 20 * 2**20
