// What the page tells beside the conversation: a line that stays while something is wrong, and notes that pass.

import { byId, make, textButton } from "./elements.js";
import { say } from "./words.js";

const SHOWN_SECONDS = 8;

/** Show a line above the conversation until it is hidden, with buttons as [text, action] pairs. */
export function showBanner(text, ...buttons) {
  const banner = byId("banner");
  banner.replaceChildren(make("span", { text }), ...buttons.map(([label, action]) => textButton(label, action, { class: "text-button" })));
  banner.hidden = false;
}

export function hideBanner() {
  byId("banner").hidden = true;
}

/** Show a note that passes, and can be undone if `undo` is given. */
export function showToast(text, undo = null) {
  const toast = make("div", { class: "toast" }, make("span", { text }));
  const remove = () => toast.remove();
  let timer = setTimeout(remove, SHOWN_SECONDS * 1_000);
  if (undo !== null) {
    toast.append(textButton(say("undo"), () => { remove(); undo(); }, { class: "text-button" }));
    for (const event of ["pointerenter", "focusin"]) toast.addEventListener(event, () => clearTimeout(timer));
    for (const event of ["pointerleave", "focusout"]) toast.addEventListener(event, () => (timer = setTimeout(remove, SHOWN_SECONDS * 1_000)));
  }
  byId("toasts").replaceChildren(toast);
}

/** Have screen readers say something. */
export function announce(text) {
  byId("announcer").textContent = text;
}
