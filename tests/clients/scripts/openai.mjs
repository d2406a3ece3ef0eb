// The official openai client for Node: prints what it saw as one JSON object.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [base, busy] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "x", maxRetries: 0 });
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
const Person = z.object({ name: z.string(), age: z.number().int() });
const out = {};

const chat = await client.chat.completions.create({ model: "demo", messages: user("Hello!") });
out.chat = chat.choices[0].message.content;

let text = "";
for await (const chunk of await client.chat.completions.create({ model: "demo", messages: user("Hello!"), stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
out.stream = text;

const helper = client.chat.completions.stream({ model: "demo", messages: user("Hello!") });
out.helper = (await helper.finalChatCompletion()).choices[0].message.content;

const runner = client.chat.completions.runTools({
  model: "demo",
  messages: user("What is the weather in Paris?"),
  tools: [{ ...weather, function: { ...weather.function, parse: JSON.parse, function: () => '{"temp": 18, "sky": "clear"}' } }],
});
out.tools = await runner.finalContent();

const parsed = await client.chat.completions.parse({
  model: "demo", messages: user("Give me a person as JSON."), response_format: zodResponseFormat(Person, "person"),
});
out.parsed = parsed.choices[0].message.parsed;

out.response = (await client.responses.create({ model: "demo", input: "Hello!" })).output_text;
const events = client.responses.stream({ model: "demo", input: "Hello!" });
out.responseStream = (await events.finalResponse()).output_text;
out.responseParsed = (await client.responses.parse({
  model: "demo", input: "Give me a person as JSON.", text: { format: zodTextFormat(Person, "person") },
})).output_parsed;

const thinking = await client.chat.completions.create({ model: "demo", messages: user("What is 17 + 25?") });
out.thinking = thinking.choices[0].message.reasoning_content;

out.embedding = (await client.embeddings.create({ model: "embedder", input: ["a", "b"] })).data.map((e) => e.embedding.length);

try {
  await client.chat.completions.create({ model: "nosuch", messages: user("x") });
} catch (error) {
  out.error = [error.constructor.name, error.status, error.code, Boolean(error.requestID)];
}

const patient = new OpenAI({ baseURL: `${busy}/v1`, apiKey: "x", maxRetries: 5 });
const holder = await patient.chat.completions.create({ model: "a", messages: user("go"), stream: true });
const held = (async () => { for await (const _ of holder); })();
out.retried = (await patient.chat.completions.create({ model: "b", messages: user("go") })).choices[0].message.content;
await held;

const leaving = await client.chat.completions.create({ model: "demo", messages: user("Tell me a long story."), stream: true });
for await (const _ of leaving) { leaving.controller.abort(); break; }
out.left = true;
console.log(JSON.stringify(out));
