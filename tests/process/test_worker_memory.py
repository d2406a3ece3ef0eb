"""A real worker with little memory and many long prompts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.launcher import launch
from mlx_router_server.workers.link import WorkerLink
from mlx_router_server.workers.run_directory import RunDirectory
from mlx_router_shared.cache_size import estimate_cache, estimate_work
from mlx_router_shared.errors import ErrorCode
from mlx_router_shared.generation import Event, Failure, Finish, GenerationRequest, Sampling, TextDelta, Usage
from mlx_router_shared.protocol import Bootstrap, Load
from tests.tiny_models.architectures import make_architecture

_PROMPTS = 16
_TOKENS = 4_000


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_worker_stays_within_a_small_limit_and_answers_everything_in_order(tmp_path: Path) -> None:
    model = make_architecture(
        tmp_path / "model", "qwen3", num_key_value_heads=4, head_dim=64, max_position_embeddings=32_768
    )
    config = json.loads((model / "config.json").read_text())
    rows = 2 * estimate_cache(config).bytes_for(_TOKENS + 300)  # in single precision
    work = estimate_work(config, fused_attention=False)
    limit = 2 * 3 * rows + work.bytes_for(64, _TOKENS + 300)

    async def test() -> None:
        directory = RunDirectory.create(tmp_path)
        link = WorkerLink(directory.endpoint)
        process = await launch("w-1")
        handle = WorkerHandle("w-1", "mlx", process, link, "secret")
        process.begin(Bootstrap(endpoint=directory.endpoint, worker_id="w-1", token="secret", engine="mlx"))
        try:
            await handle.wait_hello(60)
            await handle.load(
                Load(
                    model="m", path=str(model), context_tokens=32_768, parallel=16, requests_limit_bytes=limit,
                    cache_limit_bytes=1,
                ),
                60,
            )  # fmt: skip
            loaded = handle.memory_bytes
            order: list[int] = []
            ends: dict[int, list[Event]] = {}
            peak = 0

            async def ask(number: int) -> None:
                tokens = [10 + (7 * place + number) % 900 for place in range(_TOKENS)]
                request = GenerationRequest(prompt_tokens=tokens, max_tokens=8, sampling=Sampling(temperature=0.0))
                ends[number] = []
                async for events in handle.generate(request):
                    if number not in order and any(isinstance(event, TextDelta | Usage) for event in events):
                        order.append(number)
                    ends[number].extend(events)

            asked = [asyncio.create_task(ask(number)) for number in range(_PROMPTS)]
            while not all(task.done() for task in asked):
                peak = max(peak, handle.memory_bytes)
                await handle.get_stats(30)
            await asyncio.gather(*asked)
            stats = await handle.get_stats(5)
            assert order == list(range(_PROMPTS))
            assert all(isinstance(events[-1], Finish) for events in ends.values())
            assert peak - loaded > rows, "the memory was used"
            assert peak <= 1.05 * (loaded + limit)
            assert stats.peak_bytes <= 1.05 * (limit + 2_500_000)
            longer = GenerationRequest(prompt_tokens=[10] * 30_000, max_tokens=1)
            refused = [event async for events in handle.generate(longer) for event in events]
            (failure,) = refused
            assert isinstance(failure, Failure)
            assert failure.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED
            assert "30000 tokens" in failure.message
        finally:
            await handle.stop("the test is over", 5)
            await link.close()
            directory.remove()

    async def bounded() -> None:
        async with asyncio.timeout(480):
            await test()

    asyncio.run(bounded())
