// The table of models, the memory bar, the speed, and what can be done with a model.

import { json } from "./api.js";
import { $, el, fill, seconds, size } from "./dom.js";

const MOST_ROWS = 60;
const ORDER = ["ready", "draining", "loading", "starting", "queued", "stopping", "backoff", "failed", "unloaded"];
const POINTS = 120;

let before = null;            // the last status and when it came, for speeds
const speeds = [];
let refresh = () => {};
const rows = new Map();

export function startModels(onChange) {
  refresh = onChange;
  $("filter").addEventListener("input", () => before && drawModels(before.status, before.rates));
}

export function drawStatus(status) {
  const now = performance.now();
  const rates = new Map();
  const counted = new Map(status.models.map((model) => [model.runs_as, model.tokens_total]));
  let total = 0;
  for (const [name, tokens] of counted) {
    const earlier = before?.tokens.get(name);
    const rate = earlier === undefined ? 0 : Math.max(0, tokens - earlier) * 1000 / Math.max(now - before.at, 1);
    rates.set(name, rate);
    total += rate;
  }
  // Two looks in quick succession say little about a speed.
  if (!before || now - before.at > 700) { drawSpeed(total); before = { at: now, tokens: counted, status, rates }; }
  else { before.status = status; }
  drawModels(status, before.rates);
  drawMemory(status);
}

function drawSpeed(total) {
  speeds.push(total);
  if (speeds.length > POINTS) speeds.shift();
  const most = Math.max(...speeds, 1);
  const points = speeds.map((value, at) => `${(240 * (POINTS - speeds.length + at) / (POINTS - 1)).toFixed(1)},${(58 - 56 * value / most).toFixed(1)}`);
  $("speed-chart").querySelector("polyline").setAttribute("points", points.join(" "));
  const words = `${Math.round(total)} now, ${Math.round(Math.max(...speeds))} at most in the last ${speeds.length} looks`;
  $("speed-words").textContent = words;
  $("speed-chart").setAttribute("aria-label", `Tokens per second: ${words}`);
}

function drawMemory(status) {
  const { budget_bytes: budget, reserved_bytes: reserved, memory } = status.router;
  const held = new Map(status.models.filter((model) => model.pid).map((model) => [model.pid, model.memory_bytes]));
  const measured = [...held.values()].reduce((sum, bytes) => sum + bytes, 0);
  const share = (bytes) => `${Math.min(100, 100 * bytes / Math.max(budget, 1)).toFixed(2)}%`;
  const bar = $("memory-bar");
  bar.querySelector(".measured").style.width = share(measured);
  bar.querySelector(".reserved").style.width = share(Math.max(0, reserved - measured));
  const facts = [["measured", "measured", size(measured)], ["reserved", "reserved", size(reserved)],
    ["", "budget", size(budget)], ["", "not reserved", size(Math.max(0, budget - reserved))]];
  if (memory) {
    facts.push(["", "free on the machine", `${size(memory.available_bytes)} of ${size(memory.total_bytes)}`]);
    if (memory.pressure !== "normal") facts.push(["", "pressure", memory.pressure]);
  }
  bar.setAttribute("aria-label", facts.map(([, name, value]) => `${name} ${value}`).join(", "));
  bar.dataset.measured = measured;
  $("memory-legend").replaceChildren(...facts.map(([mark, name, value]) =>
    el("div", {}, ...(mark ? [el("span", { class: `mark ${mark}`, "aria-hidden": "true" })] : []), el("dt", {}, name), el("dd", {}, value))));
}

function drawModels(status, rates) {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = status.models.filter((model) => model.name.toLowerCase().includes(wanted))
    .sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || a.name.localeCompare(b.name));
  const shown = found.slice(0, MOST_ROWS);
  $("models-count").textContent = found.length > shown.length ? `${shown.length} of ${found.length}` : `${found.length}`;
  const body = $("models-rows");
  const names = new Set(shown.map((model) => model.name));
  for (const [name, row] of rows) if (!names.has(name)) { row.element.remove(); rows.delete(name); }
  shown.forEach((model, at) => {
    let row = rows.get(model.name);
    if (!row) { row = newRow(model.name); rows.set(model.name, row); }
    row.draw(model, rates.get(model.runs_as) ?? 0);
    // A row stays where it is while it has the focus: nobody's key press shall land on another model.
    if (body.children[at] !== row.element && !row.element.contains(document.activeElement)) {
      body.insertBefore(row.element, body.children[at] ?? null);
    }
  });
}

function newRow(name) {
  const cell = (label, kind = "") => el("td", { "data-label": label, class: kind });
  const state = cell("", "where"), memory = cell("Memory", "number"), active = cell("Active", "number");
  const waiting = cell("Waiting", "number"), speed = cell("Tokens/s", "number"), actions = el("div", { class: "tools" });
  const word = el("span", { class: "state" }), why = el("span", { class: "why" }), progress = el("progress", { max: "1", "aria-label": `Loading ${name}` });
  state.append(word, why, progress);
  const hidden = (text) => `${text} ${name}`;
  const load = el("button", { type: "button" }), pin = el("button", { type: "button" });
  const plan = el("button", { type: "button", "aria-label": hidden("Plan for"), onclick: () => showPlan(name) }, "Plan");
  actions.append(load, pin, plan);
  const element = el("tr", { "data-model": name }, el("th", { scope: "row" }, name), state, memory, active, waiting, speed, el("td", {}, actions));
  let model = null;
  const act = async (button, what) => {
    button.disabled = true;
    why.textContent = "";
    row.failure = "";
    try { await json(`/admin/models/${encodeURIComponent(name)}/${what}`, { method: "POST" }); }
    catch (error) { row.failure = error.message; }
    finally { button.disabled = false; refresh(); }
  };
  load.addEventListener("click", () => act(load, idle(model) ? "load" : "unload"));
  pin.addEventListener("click", () => act(pin, model.pinned ? "unpin" : "pin"));
  const row = {
    element, failure: "",
    draw(now, rate) {
      model = now;
      word.textContent = now.state + (now.stage ? `: ${now.stage}` : "");
      word.className = `state ${now.state}`;
      const shares = now.runs_as === now.name ? "" : `runs as ${now.runs_as}. `;
      const stays = now.in_flight ? "in use" : now.pinned ? "pinned" : now.expires_in_seconds === -1 ? "stays" :
        now.expires_in_seconds ? `leaves in ${seconds(now.expires_in_seconds)}` : "";
      why.textContent = row.failure || shares + (now.reason && now.state !== "ready" ? now.reason : stays);
      why.classList.toggle("bad", Boolean(row.failure));
      progress.hidden = now.state !== "loading";
      if (now.state === "loading") progress.value = now.fraction;
      memory.textContent = now.memory_bytes ? size(now.memory_bytes) : "–";
      active.textContent = now.in_flight; waiting.textContent = now.queued; speed.textContent = Math.round(rate);
      const verb = idle(now) ? "Load" : "Unload";
      load.textContent = verb; load.setAttribute("aria-label", hidden(verb));
      pin.textContent = now.pinned ? "Unpin" : "Pin"; pin.setAttribute("aria-label", hidden(pin.textContent));
    },
  };
  return row;
}

function idle(model) { return ["unloaded", "backoff", "failed"].includes(model.state); }

async function showPlan(name) {
  const words = { serve: "served at once", join: "joins a load that has begun", load: "loaded at once",
    evict: "loaded once others have left", wait: "waits", refuse: "refused" };
  let facts = [];
  try {
    const plan = await json("/admin/plan", { method: "POST", body: { model: name } });
    $("plan-words").textContent = `${name}: ${words[plan.action]}${plan.reason ? ` (${plan.reason})` : ""}`;
    facts = [["needs", size(plan.estimate_bytes)], ["budget", size(plan.budget_bytes)],
      ["not reserved", size(Math.max(0, plan.budget_bytes - plan.reserved_bytes))],
      ...plan.evict.map((victim) => ["evicts", `${victim.model}, ${size(victim.reserved_bytes)}${victim.drains_first ? ", after its requests" : ""}`]),
      ...(plan.wait_for.length ? [["waits for", plan.wait_for.join(", ")]] : []),
      ...(plan.wait_seconds === null ? [] : [["begins in", `about ${seconds(plan.wait_seconds)}`]])];
  } catch (error) {
    $("plan-words").textContent = error.message;
  }
  $("plan-facts").replaceChildren(...facts.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
  $("plan-dialog").showModal();
}

export function drawQueue(queue) {
  fill($("queue"), queue.map((waiter) => el("li", {},
    `${waiter.position}. ${waiter.model}, ${seconds(waiter.waited_seconds)}${waiter.priority ? `, priority ${waiter.priority}` : ""}`)), "none");
}
