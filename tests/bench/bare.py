"""The floor: mlx-lm's batch generator in a loop of its own, without router, worker, text or sockets.

``python -m tests.bench.bare MODEL`` reads lines of ``STREAMS TOKENS`` and answers each with the tokens it made and the
seconds that took.
"""

from __future__ import annotations

import sys
import time

from mlx_lm import load
from mlx_lm.generate import BatchGenerator

__all__ = ["PROMPT", "SHORT_PROMPT"]

PROMPT = "Tell me about the harbour, the ferry and the light, number {}."


SHORT_PROMPT = "go"  # for loads: reading a long prompt on a CPU would take longer than the weights


def main() -> None:
    model, tokenizer = load(sys.argv[1])[:2]
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=32,
        prefill_batch_size=8,
        prefill_step_size=512,
    )
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        started = time.perf_counter()
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": PROMPT.format(number)}], add_generation_prompt=True
            )
            for number in range(streams)
        ]
        generator.insert(prompts, [tokens] * streams)
        made = 0
        while (batch := generator.next()) != ([], []):
            made += sum(response.finish_reason != "stop" for response in batch[1])
        print(made, time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
