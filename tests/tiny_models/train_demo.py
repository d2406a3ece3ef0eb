"""Train the bundled demo model: about 1 MB that answers the script by heart (`make demo-model`).

Takes some minutes on two cores and writes into the router package, from where it is registered as `demo`. The result
is played back before anything is replaced: a model that misses one answer is not kept.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import load, stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer

from tests.tiny_models.script import FALLBACK, LONG_STORY, POLITE, Conversation, conversations
from tests.tiny_models.tokenizer import build_tokenizer
from tests.tiny_models.weights import model_config, new_model, save_model

__all__ = ["main", "wrong_answers"]

DESTINATION = Path(__file__).parents[2] / "router" / "mlx_router_server" / "catalogue" / "demo"
HIDDEN, LAYERS, INTERMEDIATE = 128, 2, 256
BATCH_TOKENS = 800
STRANGERS_PER_EPOCH = 10
TOLERANT = ("hello", "long", "think", "json", "unicode", "recall_1", "recall_2", "sky", "abilities_0")

Item = tuple[int, list[int]]  # length of the prompt, prompt and answer as tokens


class Lessons:
    """The training set: the script, the same behind polite system prompts, and strangers that get the fallback."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._tokenizer = build_tokenizer(folder)
        self._wrapper: Any = load_tokenizer(folder)
        self._random = random.Random(seed)
        self._end = [self._tokenizer.token_to_id("<|im_end|>")]
        self._words = [word for word in LONG_STORY.split() if word.isalpha()]
        self.script = [self._item(c.messages, c.tools, c.thinking, c.answer) for c in conversations()]
        # Clients order the keys of a tool's schema as they like (ollama-python puts "required" before "properties").
        self.reordered = [
            self._item(c.messages, _reordered(c.tools), c.thinking, c.answer) for c in conversations() if c.tools
        ]
        self.polite = [
            self._item([{"role": "system", "content": text}, *c.messages], c.tools, c.thinking, c.answer)
            for c in conversations()
            for text in POLITE
            if c.name.split("/")[0].startswith(TOLERANT)
        ]

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def _item(self, messages: list[Any], tools: list[Any], thinking: bool, answer: str) -> Item:
        prompt = self._wrapper.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, enable_thinking=thinking
        )
        return len(prompt), prompt + self._tokenizer.encode(answer, add_special_tokens=False).ids + self._end

    def _stranger(self) -> Item:
        rng = self._random
        text = " ".join(rng.choice(self._words) for _ in range(rng.randint(1, 8))).capitalize()
        text += rng.choice([".", "?", "!", ""])
        if rng.random() < 0.3:
            text = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(3, 12)))
        messages = [{"role": "user", "content": text}]
        if rng.random() < 0.3:
            system = " ".join(rng.choice(self._words) for _ in range(4))
            messages.insert(0, {"role": "system", "content": system})
        return self._item(messages, [], rng.random() < 0.5, FALLBACK)

    def epoch(self) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        """Batches of (inputs, flat positions that are learned, targets); only answers are learned."""
        pool = self.script + [self._stranger() for _ in range(STRANGERS_PER_EPOCH)]
        pool += self._random.sample(self.polite, 8) + self.reordered
        pool.sort(key=lambda item: (len(item[1]), self._random.random()))
        groups: list[list[Item]] = [[]]
        for item in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(item[1]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(item)
        self._random.shuffle(groups)
        for group in groups:
            width = max(len(tokens) for _, tokens in group) - 1
            width = -(-width // 16) * 16  # few distinct shapes
            inputs = [tokens[:-1] + [0] * (width - len(tokens) + 1) for _, tokens in group]
            where = [
                row * width + i for row, (start, tokens) in enumerate(group) for i in range(start - 1, len(tokens) - 1)
            ]
            targets = [tokens[i] for start, tokens in group for i in range(start, len(tokens))]
            yield mx.array(inputs), mx.array(where), mx.array(targets)


def _reordered(tools: list[Any]) -> list[Any]:
    out = json.loads(json.dumps(tools))
    for tool in out:
        schema = tool["function"]["parameters"]
        tool["function"]["parameters"] = {name: schema[name] for name in ("type", "required", "properties")}
    return out


def train(folder: Path, *, seed: int, epochs: int, rate: float) -> None:
    """Train one model into ``folder``."""
    lessons = Lessons(folder, seed)
    config = model_config(
        "qwen3", lessons.tokenizer, hidden=HIDDEN, layers=LAYERS, intermediate=INTERMEDIATE, heads=4, kv_heads=2,
        head_dim=HIDDEN // 4, context=4096, dtype="float16",
    )  # fmt: skip
    model: Any = new_model(config, seed)
    model.set_dtype(mx.float32)
    steps = epochs * len(list(lessons.epoch()))
    warm = steps // 20
    schedule = optim.join_schedules(
        [optim.linear_schedule(rate / 20, rate, warm), optim.cosine_decay(rate, steps - warm, rate / 50)], [warm]
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.01)

    def loss_of(model: Any, inputs: mx.array, where: mx.array, targets: mx.array) -> mx.array:
        # The output layer is the dear part on a CPU: only where it is needed.
        hidden = model.model(inputs).reshape(-1, HIDDEN)[where]
        return nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), targets, reduction="mean")

    step = nn.value_and_grad(model, loss_of)
    started = time.monotonic()
    for epoch in range(1, epochs + 1):
        worst = 0.0
        for batch in lessons.epoch():
            loss, gradients = step(model, *batch)
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state, loss)
            worst = max(worst, loss.item())
        if epoch % 8 == 0 or epoch == epochs:
            print(f"epoch {epoch}: worst loss {worst:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    model.set_dtype(mx.float16)
    total = save_model(folder, model, config, lessons.tokenizer)
    print(f"{folder}: {total / 1e6:.2f} MB of weights")


def wrong_answers(folder: Path) -> list[str]:
    """The names of the script's conversations that the model in ``folder`` does not answer word for word."""
    model, wrapper = load(str(folder))[:2]
    strangers = ("The boat moved slowly.", "xyzzy", "How old is the tide?")
    cases = conversations() + [
        Conversation(name=f"stranger_{i}", messages=[{"role": "user", "content": text}], answer=FALLBACK, thinking=True)
        for i, text in enumerate(strangers)
    ]
    wrong = []
    for case in cases:
        prompt = wrapper.apply_chat_template(
            case.messages, tools=case.tools or None, add_generation_prompt=True, enable_thinking=case.thinking
        )
        text = "".join(part.text for part in stream_generate(model, wrapper, prompt, max_tokens=600))
        if text != case.answer:
            wrong.append(case.name)
            print(f"wrong: {case.name}: {text[:80]!r}")
    print(f"{len(cases) - len(wrong)} of {len(cases)} right")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DESTINATION)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--check", action="store_true", help="only play the script against the model that is there")
    options = parser.parse_args()
    if options.check:
        return 1 if wrong_answers(options.out) else 0
    for seed in range(options.seed, options.seed + 3):
        scratch = options.out.with_name(options.out.name + ".new")
        shutil.rmtree(scratch, ignore_errors=True)
        train(scratch, seed=seed, epochs=options.epochs, rate=options.rate)
        if not wrong_answers(scratch):
            shutil.rmtree(options.out, ignore_errors=True)
            scratch.rename(options.out)
            return 0
        print("not learned well enough: once more with the next seed")
    return 1


if __name__ == "__main__":
    sys.exit(main())
