// The official ollama client for Node: prints what it saw as one JSON object.
import { Ollama } from "ollama";

const [base] = process.argv.slice(2);
const client = new Ollama({ host: base });
const user = (content) => [{ role: "user", content }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Current weather of a city",
    parameters: {
      type: "object",
      properties: { city: { type: "string" }, unit: { type: "string" } },
      required: ["city"],
    },
  },
};
const out = {};

out.chat = (await client.chat({ model: "demo", messages: user("Hello!") })).message.content;
let text = "";
for await (const part of await client.chat({ model: "demo", messages: user("Hello!"), stream: true })) text += part.message.content;
out.stream = text;
out.generate = (await client.generate({ model: "demo", prompt: "Hello!" })).response;

const messages = user("What is the weather in Paris?");
const first = await client.chat({ model: "demo", messages, tools: [weather], think: false });
const [call] = first.message.tool_calls;
out.call = [call.function.name, call.function.arguments];
const second = await client.chat({
  model: "demo", tools: [weather], think: false,
  messages: [...messages, first.message, { role: "tool", tool_name: "get_weather", content: '{"temp": 18, "sky": "clear"}' }],
});
out.tools = second.message.content;

const schema = { type: "object", properties: { sum: { type: "integer" } }, required: ["sum"], additionalProperties: false };
out.format = JSON.parse((await client.chat({ model: "demo", messages: user("What is 17 + 25?"), format: schema, options: { num_predict: 200 } })).message.content);
out.thinking = (await client.chat({ model: "demo", messages: user("What is 17 + 25?"), think: true })).message.thinking;
out.embedding = (await client.embed({ model: "embedder", input: ["a", "b"] })).embeddings.map((e) => e.length);
out.list = (await client.list()).models.length;
out.ps = (await client.ps()).models.length;
out.show = (await client.show({ model: "demo" })).capabilities;
out.version = (await client.version()).version;

try {
  await client.chat({ model: "nosuch", messages: user("x") });
} catch (error) {
  out.error = [error.name, error.status_code, error.message];
}

const leaving = await client.chat({ model: "demo", messages: user("Tell me a long story."), stream: true });
try {
  for await (const _ of leaving) leaving.abort();
} catch (error) {
  out.left = error.name;
}
console.log(JSON.stringify(out));
