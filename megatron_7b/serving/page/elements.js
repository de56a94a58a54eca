// Elements from data: text is always text, and no attribute is ever code.

/**
 * Build an element.
 *
 * @param {string} tag
 * @param {Object<string, unknown>} attributes `class`, `text`, `on` (listeners by event), properties that are boolean,
 *   and any attribute; one that is null, undefined or false is left out.
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Build one of the icons that index.html defines. */
export function icon(name) {
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

/** Build a button that shows an icon and is called by its label. */
export function iconButton(name, label, click, attributes = {}) {
  return make("button", { class: "icon-button", type: "button", "aria-label": label, title: label, on: { click }, ...attributes }, icon(name));
}

/** Build a button with words on it. */
export function textButton(text, click, attributes = {}) {
  return make("button", { class: "button", type: "button", text, on: { click }, ...attributes });
}

/** Return the element with an id, which index.html has. */
export function byId(id) {
  return document.getElementById(id);
}

/** Tell whether a key belongs to an input method that is composing a character: it is not for us. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229; // Safari ends the composition before its Enter, with 229
}

/** Have the browser save a text as a file. */
export function saveFile(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Copy text, also where the page has no secure context and so no clipboard (http on another host). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "unseen", readonly: true, value: text });
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus?.({ preventScroll: true });
    return copied;
  }
}
