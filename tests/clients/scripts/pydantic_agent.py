"""pydantic-ai through chat, responses and messages: prints what it saw as one JSON object."""

import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

base = sys.argv[1]


class Person(BaseModel):
    name: str
    age: int


openai = OpenAIProvider(base_url=f"{base}/v1", api_key="x")
models = {
    "chat": OpenAIChatModel("demo", provider=openai),
    "responses": OpenAIResponsesModel("demo", provider=openai),
    "messages": AnthropicModel("demo", provider=AnthropicProvider(base_url=base, api_key="x")),
}
out = {}
for name, model in models.items():
    out[name] = Agent(model).run_sync("Hello!").output
    person = Agent(model, output_type=Person, model_settings={"max_tokens": 300}).run_sync("Give me a person as JSON.")
    out[name + "_typed"] = person.output.model_dump()
print(json.dumps(out))
