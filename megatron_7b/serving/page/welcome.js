// What an empty conversation shows, and the words that index.html only names.

import { make } from "./elements.js";
import { say, spoken } from "./words.js";

const EXAMPLES = ["example1", "example2", "example3", "example4"];

/** Draw the beginning of a conversation, with examples that can be taken; or nothing. */
export function drawWelcome(element, shown, model, take) {
  element.hidden = !shown;
  if (!shown) return element.replaceChildren();
  const examples = EXAMPLES.map((name) => {
    const button = make("button", { class: "example", type: "button", text: say(name) });
    button.addEventListener("click", () => take(say(name)));
    return button;
  });
  return element.replaceChildren(
    make("h2", { text: say("welcome") }),
    make("p", { class: "quiet", text: model === null ? "" : say("welcomeModel", { model }) }),
    make("div", { class: "examples" }, ...examples),
  );
}

/** Put the words of the language that is spoken into the parts of index.html that name them. */
export function translatePage() {
  document.documentElement.lang = spoken();
  for (const element of document.querySelectorAll("[data-words]")) element.textContent = say(element.dataset.words);
  for (const element of document.querySelectorAll("[data-words-placeholder]")) element.placeholder = say(element.dataset.wordsPlaceholder);
  for (const element of document.querySelectorAll("[data-words-label]")) {
    element.setAttribute("aria-label", say(element.dataset.wordsLabel));
    if (element.matches("button")) element.title = say(element.dataset.wordsLabel);
  }
}
