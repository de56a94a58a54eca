// The list of conversations: to open, search, rename, export and delete.

import { iconButton, isComposing, make } from "./elements.js";
import { say } from "./words.js";

const DAY = 24 * 60 * 60 * 1_000;

/** Draws the list. */
export class Sidebar {
  /**
   * @param {{list: HTMLElement, search: HTMLInputElement}} places
   * @param {Object} actions open(id), rename(id, title), save(id), remove(id).
   */
  constructor(places, actions) {
    Object.assign(this, places);
    this.actions = actions;
    this.renaming = null;
    this.search.addEventListener("input", () => this.draw());
  }

  /** Draw the list as it is now. */
  show(conversations, currentId, running) {
    Object.assign(this, { conversations, currentId, running });
    this.draw();
  }

  draw() {
    if (this.renaming !== null) return; // what is being typed stays
    const found = this.conversations.list(this.search.value);
    this.search.hidden = this.conversations.all.size < 6 && this.search.value === "";
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    const groups = groupByDay(found).map(([name, members]) =>
      make("section", {}, make("h2", { text: say(name) }), make("ul", {}, ...members.map((one) => this.buildRow(one)))),
    );
    const empty = make("p", { class: "quiet", text: say(this.search.value === "" ? "noConversations" : "nothingFound") });
    this.list.replaceChildren(...(groups.length > 0 ? groups : [empty]));
    if (focused) this.list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  buildRow(conversation) {
    const { id } = conversation;
    const title = conversation.title || say("untitled");
    const open = make("button", { class: "row-button", type: "button", dir: "auto", title, "data-focus": `open ${id}`, on: { click: () => this.actions.open(id) } });
    if (this.running.has(id)) open.append(make("span", { class: "pulse", role: "img", "aria-label": say("writing") }));
    open.append(make("span", { class: "row-title", text: title }));
    if (id === this.currentId) open.setAttribute("aria-current", "page");
    const tools = make(
      "div", { class: "row-tools" },
      iconButton("edit", `${say("rename")}: ${title}`, () => this.rename(row, conversation), { "data-focus": `rename ${id}` }),
      iconButton("save", `${say("export")}: ${title}`, () => this.actions.save(id), { "data-focus": `save ${id}` }),
      iconButton("delete", `${say("delete")}: ${title}`, () => this.actions.remove(id), { "data-focus": `remove ${id}` }),
    );
    const row = make("li", { class: "row" }, open, tools);
    return row;
  }

  rename(row, conversation) {
    const field = make("input", { class: "renaming", "aria-label": say("name"), maxlength: "200", value: conversation.title });
    const end = (keep) => {
      if (this.renaming !== field) return;
      this.renaming = null;
      if (keep && field.value.trim() !== "") this.actions.rename(conversation.id, field.value.trim());
      else this.draw();
      this.list.querySelector(`[data-focus="rename ${CSS.escape(conversation.id)}"]`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (isComposing(event) || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    this.renaming = field;
    row.replaceChildren(field);
    field.focus();
    field.select();
  }
}

function groupByDay(conversations) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const groups = new Map();
  for (const conversation of conversations) {
    const { updated } = conversation;
    const name = updated >= midnight ? "today" : updated >= midnight - DAY ? "yesterday" : updated >= midnight - 7 * DAY ? "thisWeek" : "earlier";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(conversation);
  }
  return [...groups];
}
