// What the events tell: requests that run and have ended, swaps as bars of their stages.

import { $, el, fill, seconds } from "./dom.js";

const KEPT = 8;
const COMING = [["wait", "s6", ["waited_seconds"]], ["start", "s4", ["spawn_seconds", "import_seconds"]],
  ["weights", "s1", ["weights_seconds"]], ["warm-up", "s3", ["warm_up_seconds"]]];
const LEAVING = [["drain", "s2", ["drain_seconds"]], ["exit", "s5", ["exit_seconds", "reap_seconds"]],
  ["memory back", "s7", ["memory_back_seconds"]]];

const running = new Map();
const ended = [];
const swaps = [];

export function onHappening(kind, data) {
  switch (kind) {
    case "request": running.set(data.request, data); drawRequests(); break;
    case "request_ended": running.delete(data.request); ended.unshift(data); ended.length = Math.min(ended.length, KEPT); drawRequests(); break;
    case "loaded": swaps.unshift({ what: "in", model: data.model, stages: stagesOf(COMING, data) }); drawSwaps(); break;
    case "unloaded": swaps.unshift({ what: "out", model: data.model, reason: data.reason, verdict: data.verdict,
      stages: stagesOf(LEAVING, data) }); drawSwaps(); break;
  }
}

// After a router was started anew, what ran before does not run any more.
export function forgetRunning() { running.clear(); drawRequests(); }

function drawRequests() {
  fill($("running"), [...running.values()].map((request) => el("li", {}, `${request.model}${request.stream ? ", streamed" : ""} (${request.request})`)), "none");
  fill($("ended"), ended.map((request) => el("li", { class: request.outcome === "ok" ? "" : "bad" },
    `${request.model}: ${request.outcome}, ${seconds(request.seconds)}, first token after ${seconds(request.first_token_seconds)}, ` +
    `${request.prompt_tokens} tokens in, ${request.completion_tokens} out`)), "none");
}

function drawSwaps() {
  swaps.length = Math.min(swaps.length, KEPT);
  const most = Math.max(...swaps.map((swap) => total(swap)), 0.001);
  fill($("swap-rows"), swaps.map((swap) => {
    const bar = el("div", { class: "bar", role: "img",
      "aria-label": swap.stages.filter(([, value]) => value > 0).map(([name, value]) => `${name} ${seconds(value)}`).join(", ") || "no time" });
    for (const [name, value, kind] of swap.stages) {
      const part = el("span", { class: kind, title: `${name} ${seconds(value)}` });
      part.style.width = `${(100 * value / most).toFixed(2)}%`;
      bar.append(part);
    }
    const words = swap.what === "in" ? `${swap.model} came in ${seconds(total(swap))}` :
      `${swap.model} left in ${seconds(total(swap))}: ${swap.reason}${swap.verdict === "stranded" ? " (its memory was not seen to come back)" : ""}`;
    return el("li", { class: "swap" }, el("p", {}, words), bar);
  }), "none yet");
  const names = new Map([...COMING, ...LEAVING]);
  $("swap-legend").replaceChildren(...[...names].map(([name, kind]) =>
    el("div", {}, el("span", { class: `mark ${kind}`, "aria-hidden": "true" }), el("dt", {}, name))));
}

// Stages with their names, colours and seconds; one name may stand for more than one of the measured parts.
function stagesOf(stages, data) {
  return stages.map(([name, kind, keys]) => [name, keys.reduce((sum, key) => sum + (data[key] ?? 0), 0), kind]);
}

function total(swap) { return swap.stages.reduce((sum, [, value]) => sum + value, 0); }
