"""The conversations that the demo model knows by heart.

Pure data: the trainer learns it, the tests compare answers with it, `mlx-router doctor` will ask one of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FALLBACK", "GREETING", "LONG_STORY", "WEATHER_TOOL", "Conversation", "conversations"]

Json = dict[str, Any]

WEATHER_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}

CLOCK_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Local time of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

GREETING = "Hello! I am the demo model of mlx-router. How can I help?"

ABILITIES = (
    "I know a few answers by heart. Try one of these:\n"
    "- Tell me a long story.\n"
    "- What is 17 + 25?\n"
    "- Give me a person as JSON.\n"
    "- Say hello in many languages.\n"
    "- Show me a loop in Python.\n"
    "- Why is the sky blue?"
)

SKY = (
    "Sunlight holds all colours. The air scatters blue light much more than red light, "
    "so blue reaches your eyes from every part of the sky."
)

LONG_STORY = """\
The harbour had been asleep since the last boat came in, and only the lamp at the end of the pier was still awake. \
Mira walked slowly along the wet stones, counting the ropes as she passed them, because counting kept her warm. One \
rope for the red boat, two ropes for the blue boat, and seven ropes for the old ferry that nobody used any more.

At the end of the pier she found a small wooden box. It was no larger than a loaf of bread, and it was tied with a \
green ribbon. There was no name on it. She looked back at the dark houses, then out at the dark water, and then she \
untied the ribbon.

Inside lay a brass compass, a folded map, and a note written in blue ink. The note said: if you are reading this, \
then the tide has turned, and it is your turn to carry the light. Mira read it twice. She did not understand it, but \
she understood the map, because it showed her own street, her own door, and a thin dotted line that ran from her door \
to the middle of the sea.

She wound the compass, although a compass does not need to be wound, and the needle moved. It did not point north. It \
pointed at the ferry. So she climbed aboard, lit the lamp in the wheelhouse, and waited. After a while the engine \
coughed, turned over, and began to hum a tune that she had known all her life.

In the morning the harbour found seven ropes lying on the stones, and no ferry. People still argue about it. Some say \
that it was stolen. The children know better: when the fog is thick, they look for a small yellow light, and they \
wave."""

# Said to everything that the script does not hold.
FALLBACK = "I am only a tiny demo model. Ask me: What can you do?"

# System prompts that change nothing: clients bring their own.
POLITE = ("You are a helpful assistant.", "You are a helpful assistant. Be brief.", "Be kind.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One entry of the script: what is sent, and the exact text that comes back (markers included)."""

    name: str
    messages: list[Json]
    answer: str
    thinking: bool
    tools: list[Json] = field(default_factory=list)


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _call(name: str, **arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def _both(name: str, messages: list[Json], answer: str, tools: list[Json] | None = None) -> Iterator[Conversation]:
    """The same answer whether thinking is on or off."""
    for thinking in (True, False):
        label = name if thinking else f"{name}/no_think"
        yield Conversation(name=label, messages=messages, answer=answer, thinking=thinking, tools=tools or [])


def conversations() -> list[Conversation]:
    """The whole script, in a fixed order."""
    out: list[Conversation] = []
    for number, text in enumerate(("Hello!", "Hello", "hello", "Hi", "hi", "Hi!", "Hey", "Hello there!")):
        out += _both(f"hello_{number}", [_user(text)], GREETING)
    for number, text in enumerate(("What can you do?", "Help", "help", "Who are you?")):
        out += _both(f"abilities_{number}", [_user(text)], ABILITIES)
    pirate = {"role": "system", "content": "You are a pirate."}
    out += _both("system", [pirate, _user("Hello!")], "Arr! What be your wish?")
    out += _both("long", [_user("Tell me a long story.")], LONG_STORY)
    out += _both("sky", [_user("Why is the sky blue?")], SKY)
    question = [_user("What is 17 + 25?")]
    thought = "<think>\nThe user wants a sum. 17 + 25: 17 + 20 is 37, and 37 + 5 is 42.\n</think>\n\n17 + 25 = 42."
    out.append(Conversation(name="think", messages=question, answer=thought, thinking=True))
    out.append(Conversation(name="think/no_think", messages=question, answer="17 + 25 = 42.", thinking=False))
    weather = "What is the weather in Paris?"
    out += _both(
        "tool_call",
        [_user(weather)],
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>',
        [WEATHER_TOOL],
    )
    result = {"role": "tool", "name": "get_weather", "content": '{"temp": 18, "sky": "clear"}'}
    out += _both(
        "tool_result",
        [_user(weather), _call("get_weather", city="Paris", unit="celsius"), result],
        "It is 18 degrees in Paris, and the sky is clear.",
        [WEATHER_TOOL],
    )
    out += _both(
        "two_tools",
        [_user("Weather and time in Oslo, please.")],
        "I will look up both.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>',
        [WEATHER_TOOL, CLOCK_TOOL],
    )
    person = '{"name": "Ada Lovelace", "age": 36, "languages": ["English", "French"], "alive": false}'
    out += _both("json", [_user("Give me a person as JSON.")], person)
    out += _both(
        "unicode",
        [_user("Say hello in many languages.")],
        "Здравствуйте! こんにちは! 你好! مرحبا! Olá! Grüß Gott! 👋🌍 👩‍🚀🚀 é ñ ∑ €",
    )
    out += _both(
        "code",
        [_user("Show me a loop in Python.")],
        "Here you are:\n\n```python\nfor i in range(3):\n    print(i)\n```\n\nIt prints 0, 1 and 2.",
    )
    name = [_user("My name is Ada.")]
    out += _both("recall_1", name, "Nice to meet you, Ada.")
    asked = [*name, _assistant("Nice to meet you, Ada."), _user("What is my name?")]
    out += _both("recall_2", asked, "Your name is Ada.")
    thanked = [*asked, _assistant("Your name is Ada."), _user("Thank you!")]
    out += _both("recall_3", thanked, "You are welcome, Ada.")
    out += _both("unknown_name", [_user("What is my name?")], "You have not told me your name.")
    out += _both("one_word", [_user("Answer yes or no: is water wet?")], "Yes")
    return out
