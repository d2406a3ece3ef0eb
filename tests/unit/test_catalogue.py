"""What is a model and what is not, by content; and the index that is made of it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.aliases import SHIPPED
from mlx_router_server.catalogue.architectures import has_vlm, servable_architectures
from mlx_router_server.catalogue.catalogue import DEMO_FOLDER, Catalogue, Registered, Sources
from mlx_router_server.catalogue.discovery import discover_hub, hub_cache
from mlx_router_server.catalogue.entry import Capability
from mlx_router_server.catalogue.extras import install_command
from mlx_router_server.catalogue.index import IndexBuilder
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_server.catalogue.kinds import Kind
from mlx_router_server.catalogue.names import DEFAULT_HOST, parse_name
from mlx_router_server.catalogue.quantization import why_unreadable
from mlx_router_shared.errors import InvalidRequest, ModelNotFound
from mlx_router_worker.text.pooling import read_pooling


def write_model(folder: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    """A folder with the files of a model and one tiny tensor."""
    folder.mkdir(parents=True)
    default = {"model_type": "qwen3", "max_position_embeddings": 4096, "num_hidden_layers": 2, "hidden_size": 8,
               "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(default if config is None else config))
    header = json.dumps({"w": {"dtype": "F16", "shape": [4, 2], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_the_demo_model_is_what_it_is() -> None:
    files = inspect_folder(DEMO_FOLDER)
    assert files.family == "qwen3"
    assert files.capabilities == {Capability.COMPLETION, Capability.TOOLS, Capability.THINKING}
    assert files.context_tokens == 4096
    assert 400_000 < files.parameters < 500_000
    assert files.weights_bytes == files.parameters * 2
    assert len(files.digest) == 64
    # 2 layers, keys and values, 2 heads of 32 in half precision
    assert files.cache.per_token == 2 * 2 * 2 * 32 * 2


def test_the_architectures_come_from_mlx_lm_and_include_renamed_ones() -> None:
    found = servable_architectures()
    assert {"qwen3", "llama", "mistral", "gemma3"} <= found
    assert "roberta" not in found


@pytest.mark.req("R28")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "roberta"}, "no architecture 'roberta'"),
        ({}, "names no model_type"),
        ({"model_type": "qwen3", "model_file": "evil.py"}, "code of its own"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"model_type": 5}, "names no model_type"),
    ],
)
def test_what_cannot_be_served_says_why(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotServable, match=reason):
        inspect_folder(write_model(tmp_path / "m", config))


@pytest.mark.req("R28")
def test_an_unfinished_download_is_not_served(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": "model.safetensors", "x": "model-2.safetensors"}})
    folder = write_model(tmp_path / "m", None, **{"model.safetensors.index_json": index})
    with pytest.raises(NotServable, match=r"model-2\.safetensors is missing"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"hello", (10**15).to_bytes(8, "little")]
)
def test_hostile_weights_are_a_reason_and_not_an_exception(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(NotServable, match="safetensors"):
        inspect_folder(folder)


def test_hostile_json_is_a_reason_and_not_an_exception(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(NotServable, match=r"config\.json"):
        inspect_folder(folder)


@pytest.mark.req("R27")
def test_the_name_is_no_evidence(tmp_path: Path) -> None:
    chat = inspect_folder(write_model(tmp_path / "chat-embed-tuned"))
    assert chat.capabilities == {Capability.COMPLETION}
    embedding = inspect_folder(write_model(tmp_path / "plain", None, **{"1_Pooling__config_json": "{}"}))
    assert embedding.capabilities == {Capability.EMBEDDING}


def _put_in_hub(cache: Path, repo: str, revision: str, tmp_path: Path) -> Path:
    base = cache / f"models--{repo.replace('/', '--')}"
    write_model(base / "snapshots" / revision)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(revision)
    return base


def test_the_hub_cache_is_served_in_place_at_its_main_revision(tmp_path: Path) -> None:
    _put_in_hub(tmp_path, "org/name", "aaa", tmp_path)
    _put_in_hub(tmp_path, "org/name", "bbb", tmp_path)
    (tmp_path / "datasets--org--name").mkdir()
    (found,) = discover_hub(tmp_path)
    assert (found.name, found.path.name) == ("org/name", "bbb")


def test_the_hub_cache_is_where_huggingface_puts_it() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/x"}) == Path("/x")
    assert hub_cache({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")


@pytest.mark.req("R25", "R32")
def test_what_is_listed_is_what_resolves_and_links_do_not_lead_out(tmp_path: Path) -> None:
    folder, hub = tmp_path / "models", tmp_path / "hub"
    write_model(folder / "plain")
    write_model(folder / "org" / "nested")
    write_model(folder / "broken", {"model_type": "roberta"})
    outside = write_model(tmp_path / "outside")
    (folder / "escape").symlink_to(outside)
    _put_in_hub(hub, "mlx-community/X-4bit", "aaa", tmp_path)
    registered = Registered(name="mine", path=outside, aliases=("other-name",))
    sources = Sources(registered=(registered,), folders=(folder,), hub=hub)

    async def look() -> None:
        catalogue = Catalogue(sources)
        await catalogue.refresh()
        names = {entry.name.display for entry in catalogue.entries()}
        assert names == {
            "demo:latest",
            "plain:latest",
            "org/nested:latest",
            "mine:latest",
            "mlx-community/X-4bit:latest",
        }
        for name in names:
            assert catalogue.resolve(name).name.display == name
        assert catalogue.resolve("OTHER-NAME").name.display == "mine:latest"
        assert {name: what.reason for name, what in catalogue.unservable.items()} == {
            "broken": "mlx-lm has no architecture 'roberta'",
            "escape": "it is a link that leads out of the folder: name the folder that it leads to in models_dirs",
        }
        for unknown in ("escape", "nosuch", "plain:7b"):
            with pytest.raises(ModelNotFound, match=f"model '{unknown}' not found"):
                catalogue.resolve(unknown)
        write_model(folder / "late")
        await catalogue.refresh()
        assert catalogue.resolve("late")

    asyncio.run(look())


_STRANGE: dict[str, tuple[dict[str, Any] | None, dict[str, str]]] = {
    "weight_map": (None, {"model.safetensors.index_json": '{"weight_map": {"a": ["x"]}}'}),
    "templates": (None, {"tokenizer_config_json": '{"chat_template": [{"name": [], "template": "x"}]}'}),
    "packing": ({"model_type": "qwen3", "quantization_config":
                 {"quant_method": "compressed-tensors", "format": []}}, {}),
    "capabilities": (None, {"fake_json": '{"capabilities": [[]]}'}),
    "numbers": ({"model_type": "qwen3", "num_hidden_layers": "many", "hidden_size": [], "vocab_size": {}}, {}),
}  # fmt: skip


@pytest.mark.req("R32")
@pytest.mark.parametrize("strange", _STRANGE)
def test_one_strange_model_hides_no_other(tmp_path: Path, strange: str) -> None:
    config, files = _STRANGE[strange]
    write_model(tmp_path / "models" / "strange", config, **files)
    write_model(tmp_path / "models" / "plain")

    async def look() -> None:
        catalogue = Catalogue(Sources(folders=(tmp_path / "models",)))
        await catalogue.refresh()
        assert catalogue.ready
        assert catalogue.resolve("plain").name.display == "plain:latest"
        assert len(catalogue.entries()) + len(catalogue.unservable) == 3

    asyncio.run(look())


def test_sources_that_cannot_be_read_leave_the_former_ones(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "plain")

    async def look() -> None:
        catalogue = Catalogue(Sources(folders=(tmp_path / "models",)), "plain")
        await catalogue.refresh()
        with pytest.raises(InvalidRequest):
            await catalogue.reconfigure(Sources(registered=(Registered(name="no name"),)), "other")
        write_model(tmp_path / "models" / "late")
        await catalogue.refresh()
        assert catalogue.resolve("late")
        assert catalogue.resolve("").name.display == "plain:latest"

    asyncio.run(look())


@pytest.mark.req("R29")
def test_an_unchanged_disk_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "models" / "plain")

    async def look() -> None:
        catalogue = Catalogue(Sources(demo=False, folders=(tmp_path / "models",)))
        await catalogue.refresh()
        monkeypatch.setattr(IndexBuilder, "build", lambda self: pytest.fail("looked again"))
        await catalogue.refresh()
        assert len(catalogue.entries()) == 1

    asyncio.run(look())


def test_models_of_equal_shape_have_different_digests(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    data = bytearray((two / "model.safetensors").read_bytes())
    data[-1] = 1
    (two / "model.safetensors").write_bytes(data)
    assert inspect_folder(one).digest != inspect_folder(two).digest


def test_encoders_are_listed_and_say_which_extra_they_need(tmp_path: Path) -> None:
    """Whether it is installed here or not; rerankers are told from classifiers by the shape of their last layer."""
    from tests.tiny_models.encoders import make_encoder, make_reranker

    encoder = inspect_folder(make_encoder(tmp_path / "encoder"))
    ranker = inspect_folder(make_reranker(tmp_path / "ranker", "xlm-roberta"))
    assert (encoder.engine, encoder.capabilities) == ("encode", frozenset({Capability.EMBEDDING}))
    assert (ranker.engine, ranker.capabilities) == ("rerank", frozenset({Capability.RERANK}))
    for files in (encoder, ranker):
        assert bool(files.unusable) != has_vlm()
        assert has_vlm() or install_command("encoders") in files.unusable
    with pytest.raises(NotServable, match="only those with one label"):
        inspect_folder(make_reranker(tmp_path / "classifier", labels=3))


_CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"
_WHISPER = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "num_mel_bins": 80}
_TTS = {"model_type": "kokoro", "architectures": ["KokoroForTextToSpeech"]}
_ASR_LLM = {"model_type": "qwen2_audio", "audio_config": {"model_type": "qwen2_audio_encoder"}}
_EAGLE = {"model_type": "llama_eagle", "architectures": ["LlamaForCausalLMEagle3"]}


@pytest.mark.req("R27", "R28")
@pytest.mark.parametrize(
    ("name", "config", "files", "kind"),
    [
        ("qwen3-embed-tuned", None, {"chat_template.jinja": _CHAT}, Kind.CHAT),
        ("whisper-of-the-woods", None, {"chat_template.jinja": _CHAT}, Kind.CHAT),
        ("tts-asr-adapter", None, {}, Kind.COMPLETION),
        ("plain", None, {"1_Pooling__config_json": "{}"}, Kind.EMBEDDING),
        ("chat", _WHISPER, {}, Kind.AUDIO_IN),
        ("chat", _TTS, {}, Kind.AUDIO_OUT),
        ("chat", _ASR_LLM, {}, Kind.AUDIO_IN),
        ("chat", {"model_type": "unheard_of"}, {"preprocessor_config_json":
            '{"feature_extractor_type": "X", "sampling_rate": 16000}'}, Kind.AUDIO_IN),
        ("chat", _EAGLE, {}, Kind.DRAFT),
        ("chat", {"model_type": "unheard_of"}, {}, Kind.UNKNOWN),
        ("chat", {"model_type": "flux"}, {}, Kind.IMAGE),
    ],
)  # fmt: skip
def test_kinds_come_from_content(
    tmp_path: Path, name: str, config: dict[str, Any] | None, files: dict[str, str], kind: Kind
) -> None:
    """Both ways: what sounds like something else is what it is, and what it is not is not offered."""
    folder = write_model(tmp_path / name, config, **files)
    served = {Kind.CHAT, Kind.COMPLETION, Kind.EMBEDDING}
    if kind in served:
        assert inspect_folder(folder).kind == kind
    else:
        with pytest.raises(NotServable) as caught:
            inspect_folder(folder)
        assert caught.value.kind == kind


@pytest.mark.req("R27")
def test_an_adapter_and_a_pipeline_of_images_are_told_apart(tmp_path: Path) -> None:
    for name, file, kind in (("a", "adapter_config.json", Kind.ADAPTER), ("b", "model_index.json", Kind.IMAGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        with pytest.raises(NotServable) as caught:
            inspect_folder(tmp_path / name)
        assert caught.value.kind == kind


@pytest.mark.req("R27")
def test_the_operator_has_the_last_word(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "a")
    assert inspect_folder(plain, "embedding").kind == Kind.EMBEDDING
    pooled = write_model(tmp_path / "b", None, **{"1_Pooling__config_json": "{}"})
    assert inspect_folder(pooled, "chat").capabilities == {Capability.COMPLETION}


@pytest.mark.req("R28")
@pytest.mark.parametrize(
    ("block", "readable"),
    [
        ({}, True),
        ({"quantization": {"group_size": 64, "bits": 4}}, True),
        ({"quantization": {"group_size": 64, "bits": 4, "layers.0": {"group_size": 32, "bits": 8}}}, True),
        ({"quantization": {"bits": 4}}, False),
        ({"quantization": 5}, False),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, True),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, False),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}}, False),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, True),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, False),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}, False),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, True),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, False),
        ({"quantization_config": {"quant_method": "mxfp4"}}, True),
        ({"quantization_config": {"quant_method": "of-the-future"}}, False),
        ({"quantization_config": {"bits": 4}}, False),
        ({"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}}, False),
    ],
)
def test_packed_weights_are_offered_only_when_mlx_lm_reads_them(block: dict[str, Any], readable: bool) -> None:
    assert (why_unreadable(block) == "") == readable


def test_the_forms_are_those_that_mlx_lm_knows() -> None:
    """A contract with mlx-lm: its loader names each method that is let through here."""
    import mlx_lm

    source = (Path(mlx_lm.__file__).parent / "utils.py").read_text()
    for method in ("bitnet", "mxfp4", "mxfp8", "fp8", "compressed-tensors", "modelopt", "awq", "gptq"):
        assert f'"{method}"' in source, method


@pytest.mark.req("R4", "R25")
def test_short_names_and_names_of_the_hub_lead_to_what_is_here(tmp_path: Path) -> None:
    _put_in_hub(tmp_path, "mlx-community/Qwen3-4B-4bit", "aaa", tmp_path)
    _put_in_hub(tmp_path, "org/other", "aaa", tmp_path)
    sources = Sources(demo=False, hub=tmp_path, model_aliases=(("house", "org/other"), ("qwen3:4b", "org/other")))

    async def look() -> None:
        catalogue = Catalogue(sources)
        await catalogue.refresh()
        assert catalogue.resolve("house").name.display == "org/other:latest"
        assert catalogue.resolve("QWEN3:4B").name.display == "org/other:latest", "the operator's word counts"
        assert catalogue.resolve("hf.co/org/other").name.display == "org/other:latest"
        assert catalogue.resolve("org/other").aliases == ("house", "qwen3:4b")
        for absent in ("qwen3:8b", "qwen3", "hf.co/org/absent"):
            with pytest.raises(ModelNotFound):
                catalogue.resolve(absent)
        assert catalogue.repository(parse_name("qwen3:8b")) == "mlx-community/Qwen3-8B-4bit"
        assert catalogue.repository(parse_name("hf.co/a/b")) == "a/b"
        assert catalogue.repository(parse_name("nosuch")) is None
        assert catalogue.repository(parse_name("evil.example/a/b")) is None
        assert catalogue.repository(parse_name("a/b:4bit")) is None

    asyncio.run(look())


def test_every_shipped_short_name_is_a_name_and_stands_for_a_repository() -> None:
    for short, repository in SHIPPED.items():
        assert parse_name(short).host == DEFAULT_HOST
        assert repository.startswith("mlx-community/")
        assert parse_name(repository).namespace == "mlx-community"


def test_what_a_worker_finds_out_is_listed_from_then_on() -> None:
    async def look() -> None:
        catalogue = Catalogue(Sources())
        await catalogue.refresh()
        assert Capability.TOOLS in catalogue.resolve("demo").files.capabilities
        before = catalogue.generation
        catalogue.note_facts("demo:latest", has_tools=False, has_thinking=True)
        assert catalogue.generation > before
        await catalogue.reconfigure(Sources(), "")
        assert catalogue.resolve("demo").files.capabilities == {Capability.COMPLETION, Capability.THINKING}
        assert catalogue.entries()[0].files.capabilities == {Capability.COMPLETION, Capability.THINKING}
        known = catalogue.generation
        catalogue.note_facts("demo:latest", has_tools=False, has_thinking=True)
        assert catalogue.generation == known, "nothing new"

    asyncio.run(look())


def test_models_stay_listed_while_their_folder_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that sleeps or a mount that is slow; the scan is repeated until it has read everything."""
    monkeypatch.setattr("mlx_router_server.catalogue.index._SCAN_SECONDS", 0.1)
    write_model(tmp_path / "models" / "one")
    builder = IndexBuilder(Sources(demo=False, folders=(tmp_path / "models",)), None)
    assert {entry.name.display for entry in builder.build().listed} == {"one:latest"}
    assert builder.is_complete
    write_model(tmp_path / "models" / "two")
    answers = threading.Event()

    def hang(path: Path, said: str) -> Any:
        answers.wait(30)
        return inspect_folder(path, said)

    monkeypatch.setattr("mlx_router_server.catalogue.index.inspect_folder", hang)
    for _ in range(2):
        assert {entry.name.display for entry in builder.build().listed} == {"one:latest"}
        assert not builder.is_complete
    answers.set()
    assert builder._scans._hanging[f"folder {tmp_path / 'models'}"].done.wait(5)
    assert {entry.name.display for entry in builder.build().listed} == {"one:latest", "two:latest"}
    assert builder.is_complete


def test_a_catalogue_is_read_again_until_every_folder_has_answered(tmp_path: Path) -> None:
    async def test() -> None:
        catalogue = Catalogue(Sources(demo=False, folders=(tmp_path,)))
        await catalogue.refresh()
        first = catalogue.generation
        await catalogue.refresh()
        assert catalogue.generation == first, "nothing has changed"
        catalogue._builder.is_complete = False
        await catalogue.refresh()
        assert catalogue.generation > first

    asyncio.run(test())


def test_only_files_that_a_loader_reads_make_a_model_another_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "models" / "m")
    builder = IndexBuilder(Sources(demo=False, folders=(tmp_path / "models",)), None)

    def stamp() -> str:
        return builder.build().listed[0].files.stamp

    before = stamp()
    for name in ("notes.txt", "README.md", "LICENSE", "imatrix.dat", ".DS_Store", "model.gguf.part"):
        (model / name).write_text("x")
    (model / "samples").mkdir()
    assert stamp() == before
    for name in ("chat_template.jinja", "merges.txt", "tokenizer.model", "qwen.tiktoken", "generation_config.json"):
        (model / name).write_text("{}")
        assert stamp() != before, name
        before = stamp()


def test_an_adapter_that_is_trained_anew_is_noticed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"1")
    registered = Registered(name="m", path=model, adapter=adapter)
    builder = IndexBuilder(Sources(demo=False, registered=(registered,)), None)
    before, entry = builder.stamps(), builder.build().listed[0]
    (adapter / "adapters.safetensors").write_bytes(b"22")
    assert builder.stamps() != before
    assert builder.build().listed[0].adapter_digest != entry.adapter_digest


def test_a_name_that_is_no_utf_8_hides_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "good")
    bad = tmp_path / os.fsdecode(b"bad\xff")
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    os.mkfifo(write_model(tmp_path / "pipe") / os.fsdecode(b"p\xff.json"))
    index = IndexBuilder(Sources(demo=False, folders=(tmp_path,)), None).build()
    assert [entry.name.display for entry in index.listed] == ["good:latest"]
    told = {name: each.reason for name, each in index.unservable.items()}
    assert set(told) == {r"bad\xff", "pipe"}
    assert "p\\xff.json is neither a file nor a folder" in told["pipe"]
    json.dumps(told).encode()
    "".join(told).encode()


def test_what_lies_one_folder_down_is_looked_at(tmp_path: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside.jinja"
    outside.write_text("secret")
    (write_model(root / "link") / "additional_chat_templates").mkdir()
    (root / "link" / "additional_chat_templates" / "tool_use.jinja").symlink_to(outside)
    (write_model(root / "pipe") / "1_Pooling").mkdir()
    os.mkfifo(root / "pipe" / "1_Pooling" / "config.json")
    pooled = write_model(root / "pooled") / "1_Pooling"
    pooled.mkdir()
    (pooled / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    builder = IndexBuilder(Sources(demo=False, folders=(root,)), None)
    before, stamps = builder.build(), builder.stamps()
    assert "leads out of the folder" in before.unservable["link"].reason
    assert "1_Pooling/config.json is neither a file nor a folder" in before.unservable["pipe"].reason
    (pooled / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert builder.stamps() != stamps
    assert builder.build().listed[0].files.stamp != before.listed[0].files.stamp


def test_weights_that_are_cut_short_are_not_servable(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    index = IndexBuilder(Sources(demo=False, folders=(tmp_path,)), None).build()
    assert "cut short" in index.unservable["cut"].reason


def test_pooling_is_read_inside_of_the_model_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model = write_model(tmp_path / "model")
    (model / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": str(outside)}]))
    assert read_pooling(model).kind == "lasttoken"
