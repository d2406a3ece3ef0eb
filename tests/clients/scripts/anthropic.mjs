// The official Anthropic client for Node: prints what it saw as one JSON object.
import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const [base, busy] = process.argv.slice(2);
const client = new Anthropic({ baseURL: base, apiKey: "x", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const weather = {
  name: "get_weather",
  description: "Current weather of a city",
  input_schema: {
    type: "object",
    properties: { city: { type: "string" }, unit: { type: "string" } },
    required: ["city"],
  },
};
const out = {};
const ask = { model: "demo", max_tokens: 300 };

out.chat = (await client.messages.create({ ...ask, messages: user("Hello!") })).content[0].text;
out.stream = await client.messages.stream({ ...ask, messages: user("Hello!") }).finalText();

const messages = user("What is the weather in Paris?");
const first = await client.messages.stream({ ...ask, messages, tools: [weather] }).finalMessage();
const call = first.content.find((block) => block.type === "tool_use");
out.call = [call.name, call.input, first.stop_reason];
const second = await client.messages.create({
  ...ask,
  tools: [weather],
  messages: [
    ...messages,
    { role: "assistant", content: first.content },
    ...user([{ type: "tool_result", tool_use_id: call.id, content: '{"temp": 18, "sky": "clear"}' }]),
  ],
});
out.tools = second.content[0].text;

const Person = z.object({ name: z.string(), age: z.number().int() });
const parsed = await client.messages.parse({
  ...ask, messages: user("Give me a person as JSON."), output_config: { format: zodOutputFormat(Person) },
});
out.parsed = parsed.parsed_output;

const thought = await client.messages.create({
  ...ask, max_tokens: 2000, messages: user("What is 17 + 25?"), thinking: { type: "enabled", budget_tokens: 1024 },
});
out.thinking = thought.content.map((block) => block.type);
out.counted = (await client.messages.countTokens({ model: "demo", messages: user("Hello!") })).input_tokens;
out.models = [];
for await (const model of client.models.list({ limit: 1 })) out.models.push(model.id);

try {
  await client.messages.create({ ...ask, model: "nosuch", messages: user("x") });
} catch (error) {
  out.error = [error.constructor.name, error.status, error.type, Boolean(error.requestID)];
}

const patient = new Anthropic({ baseURL: busy, apiKey: "x", maxRetries: 5 });
const held = patient.messages.stream({ model: "a", max_tokens: 100, messages: user("go") }).finalText();
await new Promise((resolve) => setTimeout(resolve, 200));
out.retried = (await patient.messages.create({ model: "b", max_tokens: 10, messages: user("go") })).content[0].text;
await held;

const leaving = client.messages.stream({ ...ask, messages: user("Tell me a long story.") });
for await (const _ of leaving) { leaving.abort(); break; }
out.left = true;
console.log(JSON.stringify(out));
