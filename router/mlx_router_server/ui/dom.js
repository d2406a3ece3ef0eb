// Small words for elements. Text is always text: nothing that a model or a client chose is ever read as HTML.

export const $ = (id) => document.getElementById(id);

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function size(bytes) {
  let value = bytes, unit = "B";
  for (const larger of ["KB", "MB", "GB", "TB"]) {
    if (value < 1000) break;
    value /= 1000; unit = larger;
  }
  return unit === "B" ? `${value} B` : `${value < 10 ? value.toFixed(1) : Math.floor(value)} ${unit}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}

export function fill(list, items, none) {
  list.replaceChildren(...(items.length ? items : [el("li", { class: "none" }, none)]));
}
