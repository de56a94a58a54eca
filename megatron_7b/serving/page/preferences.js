// What the page remembers beside conversations: language, appearance, the model and sampling used last.

import { checkedSampling } from "./conversations.js";

const KEY = "megatron-7b.preferences";

/** Return what was remembered, or what a first visit begins with. */
export function loadPreferences(storage) {
  let stored = {};
  try {
    stored = JSON.parse(storage?.getItem(KEY) ?? "{}") ?? {};
  } catch {
    // damaged: as on a first visit
  }
  return {
    language: typeof stored.language === "string" ? stored.language : "",
    theme: ["light", "dark"].includes(stored.theme) ? stored.theme : "",
    model: typeof stored.model === "string" ? stored.model : null,
    sampling: checkedSampling(stored.sampling),
    listHidden: stored.listHidden === true,
  };
}

/** Remember them; a full storage keeps the former ones. */
export function savePreferences(storage, preferences) {
  try {
    storage?.setItem(KEY, JSON.stringify(preferences));
  } catch {
    // nothing is lost that matters
  }
}
