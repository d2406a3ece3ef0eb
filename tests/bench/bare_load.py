"""The floor of a cold load: a process that has imported everything reads the weights and makes one token.

``python -m tests.bench.bare_load`` says ``ready``, reads a model's folder from standard input, and answers with the
seconds from there to the first token.
"""

from __future__ import annotations

import sys
import time

from mlx_lm import load
from mlx_lm.generate import BatchGenerator

from tests.bench.bare import SHORT_PROMPT


def main() -> None:
    print("ready", flush=True)
    path = sys.stdin.readline().strip()
    started = time.perf_counter()
    model, tokenizer = load(path)[:2]
    generator = BatchGenerator(model, stop_tokens=[[t] for t in tokenizer.eos_token_ids], prefill_step_size=512)
    generator.insert([tokenizer.encode(SHORT_PROMPT)], [1])
    while not generator.next()[1]:
        pass
    print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
