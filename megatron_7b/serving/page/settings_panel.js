// The settings: of the conversation (system prompt, sampling) and of the page (appearance, language, data).

import { iconButton, make, textButton } from "./elements.js";
import { say } from "./words.js";

// Names and limits are those of the API.
const SAMPLING = [
  { name: "temperature", label: "temperature", least: 0, most: 2, step: 0.1 },
  { name: "top_p", label: "topP", least: 0.01, most: 1, step: 0.01 },
  { name: "top_k", label: "topK", least: 1, most: 1_000_000, step: 1 },
  { name: "max_tokens", label: "maxTokens", least: 1, most: 1_000_000, step: 1 },
  { name: "presence_penalty", label: "presence", least: -2, most: 2, step: 0.1 },
  { name: "frequency_penalty", label: "frequency", least: -2, most: 2, step: 0.1 },
  { name: "seed", label: "seed", least: 0, most: 2_147_483_647, step: 1 },
];

/** Draws the dialog with the settings. */
export class SettingsPanel {
  /**
   * @param {HTMLDialogElement} dialog
   * @param {Object} actions changed(conversation), prefer(name, value), exportAll(), importFile(file), deleteAll(),
   *   forgetKey(), hasKey().
   */
  constructor(dialog, actions) {
    this.dialog = dialog;
    this.actions = actions;
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }

  /** Open the dialog, or draw it anew where it is open. */
  show(conversation, preferences) {
    this.dialog.replaceChildren(
      make("div", { class: "dialog-head" }, make("h2", { id: "settings-title", text: say("settings") }), iconButton("close", say("close"), () => this.dialog.close())),
      make("div", { class: "dialog-body" }, ...this.ofConversation(conversation), ...this.ofPage(preferences), ...keyboard()),
    );
    if (!this.dialog.open) this.dialog.showModal();
  }

  ofConversation(conversation) {
    const system = make("textarea", { id: "system", rows: "3", placeholder: say("systemExample"), value: conversation.system, dir: "auto" });
    system.addEventListener("input", () => {
      conversation.system = system.value;
      this.actions.changed(conversation);
    });
    const numbers = SAMPLING.map((setting) => this.numberField(conversation, setting));
    return [
      make("h3", { text: say("thisConversation") }),
      make("label", { class: "field", for: "system", text: say("system") }), system,
      make("fieldset", {}, make("legend", { text: say("sampling") }), make("p", { class: "quiet", text: say("samplingNote") }), make("div", { class: "numbers" }, ...numbers)),
    ];
  }

  numberField(conversation, { name, label, least, most, step }) {
    const field = make("input", {
      type: "number", id: `sampling-${name}`, inputmode: "decimal", min: least, max: most, step: step === 1 ? 1 : "any",
      placeholder: say("unset"), "aria-describedby": `problem-${name}`, value: conversation.sampling[name] ?? "",
    });
    const problem = make("span", { class: "field-problem", id: `problem-${name}` });
    field.addEventListener("input", () => {
      const right = field.validity.valid;
      problem.textContent = right ? "" : say("outOfRange", { least, most });
      if (!right) return;
      if (field.value === "") delete conversation.sampling[name];
      else conversation.sampling[name] = Number(field.value);
      this.actions.changed(conversation);
    });
    return make("label", { class: "number" }, make("span", { text: say(label) }), field, problem);
  }

  ofPage(preferences) {
    const file = make("input", { type: "file", accept: "application/json,.json", class: "unseen", tabindex: "-1", "aria-label": say("import") });
    file.addEventListener("change", () => file.files.length > 0 && this.actions.importFile(file.files[0]));
    const buttons = [
      textButton(say("exportAll"), () => this.actions.exportAll()),
      textButton(say("import"), () => file.click()),
      textButton(say("deleteAll"), () => this.actions.deleteAll(), { class: "button danger" }),
    ];
    if (this.actions.hasKey()) buttons.push(textButton(say("forgetKey"), () => this.actions.forgetKey()));
    const themes = [["", say("themeAuto")], ["light", say("themeLight")], ["dark", say("themeDark")]];
    return [
      make("h3", { text: say("page") }),
      make("div", { class: "numbers" },
        this.choice("theme", themes, preferences.theme),
        this.choice("language", [["en", "English"], ["zh", "中文"]], preferences.language)),
      make("h3", { text: say("data") }),
      make("div", { class: "buttons" }, ...buttons, file),
    ];
  }

  choice(name, options, chosen) {
    const select = make("select", {}, ...options.map(([value, label]) => make("option", { value, text: label, selected: value === chosen })));
    select.addEventListener("change", () => this.actions.prefer(name, select.value));
    return make("label", { class: "number" }, make("span", { text: say(name) }), select);
  }
}

function keyboard() {
  const mac = /Mac|iPhone|iPad/.test(navigator.platform);
  const keys = [
    ["Enter · Shift + Enter", "keySend"],
    ["Esc", "keyStop"],
    [mac ? "⌘ + Shift + O" : "Ctrl + Shift + O", "keyNew"],
    ["/", "keyFocus"],
    ["↑", "keyEdit"],
  ];
  const rows = keys.flatMap(([key, name]) => [make("dt", {}, make("kbd", { text: key })), make("dd", { text: say(name) })]);
  return [make("h3", { text: say("shortcuts") }), make("dl", { class: "keys" }, ...rows)];
}

/** Ask for an API key; resolves to it, or to null. */
export function askForKey(dialog, wrong) {
  return new Promise((resolve) => {
    const field = make("input", { type: "password", id: "api-key", autocomplete: "off", spellcheck: "false" });
    const close = (key) => {
      dialog.onclose = null;
      dialog.close();
      dialog.replaceChildren();
      resolve(key);
    };
    const use = () => field.value.trim() !== "" && close(field.value.trim());
    dialog.onclose = () => close(null);
    field.addEventListener("keydown", (event) => event.key === "Enter" && !isRepeated(event) && use());
    dialog.replaceChildren(
      make("div", { class: "dialog-head" }, make("h2", { id: "key-title", text: say("keyTitle") })),
      make("div", { class: "dialog-body" },
        make("label", { for: "api-key", text: say(wrong ? "wrongKey" : "needsKey") }), field,
        make("p", { class: "quiet", text: say("keyNote") }),
        make("div", { class: "buttons end" }, textButton(say("cancel"), () => close(null)), textButton(say("save"), use, { class: "button primary" }))),
    );
    dialog.showModal();
    field.focus();
  });
}

function isRepeated(event) {
  return event.repeat || event.isComposing;
}
