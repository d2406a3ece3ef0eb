"""langchain-ollama: prints what it saw as one JSON object."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel

base = sys.argv[1]


class Person(BaseModel):
    name: str
    age: int


@tool
def get_weather(city: str, unit: str = "") -> str:
    """Current weather of a city"""
    return '{"temp": 18, "sky": "clear"}'


chat = ChatOllama(model="demo", base_url=base, validate_model_on_init=True)
out = {"chat": chat.invoke("Hello!").content, "stream": "".join(str(part.content) for part in chat.stream("Hello!"))}
out["thinking"] = ChatOllama(model="demo", base_url=base, reasoning=True).invoke("What is 17 + 25?").additional_kwargs
parsed = chat.with_structured_output(Person).invoke("Give me a person as JSON.")
out["parsed"] = parsed.model_dump()
# The demo model was taught one wording of this tool, so the schema is given as it knows it.
schema = {
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
bound = ChatOllama(model="demo", base_url=base, reasoning=False).bind_tools([schema])
ask = HumanMessage("What is the weather in Paris?")
first = bound.invoke([ask])
out["call"] = first.tool_calls[0]["args"]
result = ToolMessage(get_weather.invoke(first.tool_calls[0]["args"]), tool_call_id=first.tool_calls[0]["id"])
out["tools"] = bound.invoke([ask, first, result]).content
out["llm"] = OllamaLLM(model="demo", base_url=base).invoke("Hello!")
out["embedding"] = len(OllamaEmbeddings(model="embedder", base_url=base).embed_query("a"))
print(json.dumps(out))
