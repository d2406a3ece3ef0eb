// A conversation with one model over /api/chat; nothing of it is kept.

import { json, lines, send } from "./api.js";
import { $, el } from "./dom.js";

let messages = [];
let stop = null;
let capabilities = new Map();

export function startChat() {
  $("chat-form").addEventListener("submit", (event) => { event.preventDefault(); say(); });
  $("chat-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("chat-form").requestSubmit(); }
  });
  $("chat-stop").addEventListener("click", () => stop?.abort());
  $("chat-clear").addEventListener("click", () => { stop?.abort(); messages = []; $("chat-log").replaceChildren(); $("chat-text").focus(); });
  $("chat-model").addEventListener("change", fit);
}

export async function listModels() {
  const { models } = await json("/api/tags");
  const chats = models.filter((model) => model.capabilities.includes("completion"));
  capabilities = new Map(chats.map((model) => [model.name, model.capabilities]));
  const select = $("chat-model"), chosen = select.value;
  if ([...select.options].map((option) => option.value).join() === chats.map((model) => model.name).join()) return;
  select.replaceChildren(...chats.map((model) => el("option", { value: model.name }, model.name)));
  if (capabilities.has(chosen)) select.value = chosen;
  fit();
}

function fit() {
  const can = capabilities.get($("chat-model").value) ?? [];
  $("chat-think").disabled = !can.includes("thinking");
  if ($("chat-think").disabled) $("chat-think").checked = false;
  $("chat-image-label").hidden = !can.includes("vision");
}

async function say() {
  const text = $("chat-text").value.trim();
  if (!text || stop) return;
  const conversation = messages;  // a new one may be begun meanwhile
  const body = { model: $("chat-model").value, stream: true };
  if (!$("chat-think").disabled) body.think = $("chat-think").checked;
  try {
    if ($("chat-tools").value.trim()) body.tools = JSON.parse($("chat-tools").value);
  } catch (error) {
    turn("failed", "Tools").append(el("p", {}, `not JSON: ${error.message}`));
    return;
  }
  const message = { role: "user", content: text };
  const file = $("chat-image-label").hidden ? null : $("chat-image").files[0];
  if (file) message.images = [await base64(file)];
  conversation.push(message);
  const asked = turn("user", "You");
  if (file) asked.append(el("img", { src: URL.createObjectURL(file), alt: file.name }));
  asked.append(el("p", {}, text));
  $("chat-text").value = ""; $("chat-image").value = "";
  stop = new AbortController();
  $("chat-send").disabled = true; $("chat-stop").disabled = false;
  const answer = turn("assistant", body.model);
  const told = { role: "assistant", content: "" };
  try {
    await listen(await send("/api/chat", { method: "POST", body: { ...body, messages: conversation }, signal: stop.signal }), answer, told);
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!stopped) answer.classList.add("failed");
    answer.append(el("p", { class: stopped ? "none" : "bad" }, stopped ? "stopped" : error.message));
  } finally {
    if (told.content || told.tool_calls) conversation.push(told);
    else conversation.pop();  // nothing was answered: the question is not part of what follows
    stop = null;
    $("chat-send").disabled = false; $("chat-stop").disabled = true;
  }
}

async function listen(response, answer, told) {
  const words = el("p", { class: "words" });
  let thinking = null;
  answer.append(words);
  for await (const line of lines(response)) {
    if (!line.trim()) continue;
    const data = JSON.parse(line);
    if (data.error) throw new Error(data.error);
    const message = data.message ?? {};
    if (message.thinking) {
      if (!thinking) {
        thinking = el("pre", {});
        answer.insertBefore(el("details", {}, el("summary", {}, "Thinking"), thinking), words);
      }
      thinking.textContent += message.thinking;
    }
    if (message.content) { told.content += message.content; words.textContent = told.content; }
    for (const call of message.tool_calls ?? []) {
      (told.tool_calls ??= []).push(call);
      answer.append(el("pre", { class: "call" }, `calls ${call.function.name}(${JSON.stringify(call.function.arguments)})`));
    }
    if (data.done) {
      const speed = data.eval_duration ? `, ${(data.eval_count * 1e9 / data.eval_duration).toFixed(0)} tokens/s` : "";
      answer.append(el("p", { class: "who" }, `${data.prompt_eval_count ?? 0} tokens in, ${data.eval_count ?? 0} out${speed}, ${data.done_reason}`));
    }
    const log = $("chat-log");
    log.scrollTop = log.scrollHeight;
  }
}

function turn(kind, who) {
  const made = el("div", { class: `turn ${kind}` }, el("p", { class: "who" }, who));
  $("chat-log").append(made);
  return made;
}

async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}
