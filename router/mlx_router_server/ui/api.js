// How the page talks to the router: fetch with the key of this tab, streams read as they come.

const KEY = "mlx-router-key";
let ask = null;

// The callback is told whether a key was sent and refused.
export function onKeyWanted(callback) { ask = callback; }
export function hasKey() { return Boolean(sessionStorage.getItem(KEY)); }
export function useKey(key) { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); }

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const all = { ...headers };
  if (key) all.Authorization = `Bearer ${key}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers: all, signal, cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body) });
  if (response.ok) return response;
  let message = `status ${response.status}`;
  try {
    const said = (await response.json()).error;
    message = typeof said === "string" ? said : said.message;
  } catch { /* not JSON: the status has to do */ }
  if (response.status === 401 && ask) ask(Boolean(key));
  throw new ApiError(response.status, message);
}

export async function json(path, options) { return (await send(path, options)).json(); }

export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Follow server-sent events for ever; a router that is gone is asked again, from where it broke off.
export async function follow(path, onEvent, onState) {
  let last = "";
  for (;;) {
    try {
      const response = await send(path, { headers: last ? { "Last-Event-ID": last } : {} });
      onState(true);
      let kind = "", number = "";
      for await (const line of lines(response)) {
        const at = line.indexOf(": ");
        const name = line.slice(0, at), value = line.slice(at + 2);
        if (name === "id") number = value;
        else if (name === "event") kind = value;
        else if (name === "data") { onEvent(kind, JSON.parse(value)); if (number) last = number; }
      }
      onState(false);
    } catch (error) {
      onState(false, error);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
