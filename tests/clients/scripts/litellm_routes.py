"""litellm's four routes to this server: prints what it saw as one JSON object."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

base = sys.argv[1]
ask = [{"role": "user", "content": "Hello!"}]
out = {}
for route, where in (("ollama_chat", base), ("ollama", base), ("openai", f"{base}/v1"), ("anthropic", base)):
    answer = litellm.completion(model=f"{route}/demo", messages=ask, api_base=where, api_key="x", max_tokens=100)
    out[route] = answer.choices[0].message.content
    parts = litellm.completion(
        model=f"{route}/demo", messages=ask, api_base=where, api_key="x", max_tokens=100, stream=True
    )
    out[route + "_stream"] = "".join(part.choices[0].delta.content or "" for part in parts)
out["embedding"] = len(litellm.embedding(model="ollama/embedder", input=["a"], api_base=base).data[0]["embedding"])
print(json.dumps(out))
