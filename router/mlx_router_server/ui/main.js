// Ties the page together: asks for the status, follows events and the log, and says when the router is gone.

import { follow, hasKey, json, lines, onKeyWanted, send, useKey } from "./api.js";
import { listModels, startChat } from "./chat.js";
import { $, el, size } from "./dom.js";
import { forgetRunning, onHappening } from "./happenings.js";
import { drawQueue, drawStatus, startModels } from "./models.js";

const LINES = 500;
let soon = null;
let known = "";

function connection(words, bad) {
  $("connection").textContent = words;
  $("connection").classList.toggle("bad", bad);
}

async function look() {
  try {
    const status = await json("/admin/status");
    const { version, pid, uptime_seconds: up } = status.router;
    $("about").textContent = `version ${version}, pid ${pid}, up ${Math.floor(up / 3600)} h ${Math.floor(up / 60) % 60} min`;
    drawStatus(status);
    drawQueue(status.router.queue);
    const names = `${pid} ${status.models.map((model) => model.name).join()}`;
    if (names !== known) { await listModels(); known = names; }
    connection("connected", false);
  } catch (error) {
    connection(error.status === 401 ? "a key is wanted" : error.status === 403 ? error.message : "the router does not answer; trying again", true);
  }
}

// Several events in a row are one look.
function lookSoon() {
  soon ??= setTimeout(async () => { soon = null; await look(); }, 80);
}

async function lookForEver() {
  for (;;) {
    await look();
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// ------------------------------------------------------------------------ the log

const kept = [];

function addLine(kind, line) {
  if (kind === "missed") line = { at: Date.now() / 1000, level: "warning", text: `${line.count} lines came too quickly` };
  kept.push(line);
  if (kept.length > LINES) kept.shift();
  if ($("log-hold").checked) return;
  const pre = $("log-lines");
  if (!fits(line)) return;
  const atEnd = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
  pre.append(shown(line));
  while (pre.childElementCount > LINES) pre.firstElementChild.remove();
  if (atEnd) pre.scrollTop = pre.scrollHeight;
}

function fits(line) { return line.text.toLowerCase().includes($("log-filter").value.trim().toLowerCase()); }

function shown(line) {
  return el("span", { class: line.level }, `${new Date(line.at * 1000).toLocaleTimeString()} ${line.level} ${line.text}\n`);
}

function redrawLog() {
  $("log-lines").replaceChildren(...kept.filter(fits).map(shown));
  $("log-lines").scrollTop = $("log-lines").scrollHeight;
}

// ---------------------------------------------------------------------- downloads

async function pull(name) {
  const words = el("span", {}, `${name}: asked for`), bar = el("progress", { max: "1", "aria-label": `Download of ${name}` });
  const stop = new AbortController();
  const button = el("button", { type: "button", onclick: () => stop.abort() }, `Stop ${name}`);
  const item = el("li", {}, words, bar, button);
  $("pulls").prepend(item);
  const parts = new Map();
  let last = "";
  try {
    const response = await send("/api/pull", { method: "POST", body: { model: name }, signal: stop.signal });
    for await (const line of lines(response)) {
      if (!line.trim()) continue;
      const data = JSON.parse(line);
      if (data.error) throw new Error(data.error);
      last = data.status;
      if (data.digest) {
        parts.set(data.digest, [data.completed ?? 0, data.total]);
        const sum = [...parts.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
        bar.value = sum[0] / Math.max(sum[1], 1);
        words.textContent = `${name}: ${size(sum[0])} of ${size(sum[1])}`;
      } else {
        words.textContent = `${name}: ${data.status}`;
      }
    }
    if (last !== "success") throw new Error("the connection broke off before the end; pull it again to go on");
  } catch (error) {
    words.textContent = `${name}: ${error.name === "AbortError" ? "stopped; the next pull goes on from here" : error.message}`;
    words.className = error.name === "AbortError" ? "" : "bad";
  } finally {
    button.remove();
    bar.remove();
    lookSoon();
  }
}

// -------------------------------------------------------------------------- begin

onKeyWanted((refused) => {
  $("key-error").hidden = !refused;
  if (!$("key-dialog").open) $("key-dialog").showModal();
});
$("key-dialog").addEventListener("close", () => { if ($("key-input").value) { useKey($("key-input").value.trim()); $("key-input").value = ""; $("key-button").hidden = false; look(); } });
$("key-button").hidden = !hasKey();
$("key-button").addEventListener("click", () => $("key-dialog").showModal());
$("pull").addEventListener("submit", (event) => { event.preventDefault(); pull($("pull-name").value.trim()); $("pull-name").value = ""; });
$("log-filter").addEventListener("input", redrawLog);
$("log-hold").addEventListener("change", redrawLog);
startModels(lookSoon);
startChat();
lookForEver();
follow("/admin/events?after=0", (kind, data) => { onHappening(kind, data); lookSoon(); }, (there) => { if (!there) forgetRunning(); });
follow("/admin/logs/stream?after=0", addLine, () => {});
