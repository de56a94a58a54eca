// Markdown as elements of the page, kept up to date while its text grows.
//
// Elements are made one by one and filled with text: whatever a model writes, no part of it is read as HTML.

import { parseBlocks } from "./blocks.js";
import { copyText, icon, make } from "./elements.js";
import { MAX_INLINE, parseInline } from "./spans.js";
import { say } from "./words.js";

const PART = /[^]{1,10000}(?:\s|$)|[^]{10000}/gu; // of a paragraph that is too long to look for markup in
const LONG = 50_000; // characters from which on the browser lays out only what is in view

/** The elements of one reply. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.settled = 0; // characters of the text whose blocks can't change any more
    this.open = null; // the first element that can; null if there is none
    this.blocks = []; // those of that element and of all after it
  }

  /**
   * Show a text. What was shown of its beginning stays in place, so that selections survive and work stays small.
   *
   * @param {string} text
   */
  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      [this.settled, this.open, this.blocks] = [0, null, []];
      this.element.replaceChildren();
    }
    const { settled } = this;
    const blocks = parseBlocks(text.slice(settled));
    patch(this.element, this.open, this.blocks, blocks, BLOCKS);
    this.text = text;
    // The last line may still become another block, or part of the block before it: two stay open.
    const closed = Math.max(blocks.length - 2, 0);
    if (closed > 0) this.settled = settled + blocks[closed].start;
    this.blocks = blocks.slice(closed);
    this.open = this.element.lastElementChild;
    for (let count = this.blocks.length; count > 1; count -= 1) this.open = this.open.previousElementSibling;
    this.element.classList.toggle("long", text.length > LONG);
  }
}

/**
 * Have an element, and those after it, show other values than before; what can stay, stays.
 *
 * @param {Element} parent
 * @param {Element|null} first The child that shows the first of the values.
 * @param {Array} before The values that are shown.
 * @param {Array} values
 * @param {{grow: function, build: function}} how grow(element, before, value) is false where a new element is needed.
 */
function patch(parent, first, before, values, { grow, build }) {
  let element = first;
  const shared = Math.min(before.length, values.length);
  for (let index = 0; index < shared; index += 1) {
    const next = element.nextElementSibling;
    if (!isSame(before[index], values[index]) && !grow(element, before[index], values[index])) element.replaceWith(build(values[index]));
    element = next;
  }
  for (let index = shared; index < before.length; index += 1) {
    const next = element.nextElementSibling;
    element.remove();
    element = next;
  }
  const added = document.createDocumentFragment();
  for (let index = shared; index < values.length; index += 1) added.append(build(values[index]));
  parent.append(added);
}

/** Bring an element from one block to another in place; false where a new element is needed. */
function grow(element, before, block) {
  if (before.type !== block.type) return false;
  if (block.type === "paragraph" && before.text.length > MAX_INLINE) {
    patch(element, element.firstElementChild, partsOf(before.text), partsOf(block.text), PARTS);
    return true;
  }
  if (block.type === "code" && before.language === block.language) {
    const code = element.querySelector("code");
    if (block.text.startsWith(before.text)) code.firstChild.appendData(block.text.slice(before.text.length));
    else code.firstChild.data = block.text;
    return true;
  }
  if (block.type === "list" && before.ordered === block.ordered && before.first === block.first) {
    if (before.loose !== block.loose) element.className = block.loose ? "loose" : "";
    patch(element, element.firstElementChild, before.items, block.items, ITEMS);
    return true;
  }
  if (block.type === "quote") {
    patch(element, element.firstElementChild, before.blocks, block.blocks, BLOCKS);
    return true;
  }
  if (block.type === "table" && isSame({ ...before, rows: null }, { ...block, rows: null })) {
    const body = element.querySelector("tbody");
    patch(body, body.firstElementChild, before.rows, block.rows, { grow: () => false, build: (row) => buildRow("td", row, block.align) });
    return true;
  }
  return false;
}

function growItem(element, before, item) {
  if (before.checked !== null || item.checked !== null) return false;
  patch(element, element.firstElementChild, before.blocks, item.blocks, BLOCKS);
  return true;
}

const BLOCKS = { grow, build };
const ITEMS = { grow: growItem, build: buildItem };
const PARTS = { grow: () => false, build: (text) => make("span", { class: "part", text }) };

function partsOf(text) {
  return text.match(PART);
}

/** Compare plain data, but for the lines and offsets at which blocks begin. */
function isSame(one, other) {
  if (one === other) return true;
  if (typeof one !== "object" || typeof other !== "object" || one === null || other === null) return false;
  if (Array.isArray(one)) return one.length === other.length && one.every((value, index) => isSame(value, other[index]));
  return Object.keys(other).every((key) => key === "line" || key === "start" || isSame(one[key], other[key]));
}

const BUILDERS = {
  paragraph: buildParagraph,
  heading: (block) => make(`h${Math.min(block.level + 1, 6)}`, {}, ...buildSpans(parseInline(block.text))),
  code: buildCode,
  formula: (block) => make("p", { class: "formula", text: block.text }),
  quote: (block) => make("blockquote", {}, ...block.blocks.map(build)),
  list: buildList,
  table: buildTable,
  rule: () => make("hr"),
};

function build(block) {
  return BUILDERS[block.type](block);
}

function buildParagraph({ text }) {
  return make("p", {}, ...(text.length > MAX_INLINE ? partsOf(text).map(PARTS.build) : buildSpans(parseInline(text))));
}

function buildSpans(spans) {
  return spans.map((span) => {
    if (span.type === "text") return document.createTextNode(span.text);
    if (span.type === "code") return make("code", { text: span.text });
    if (span.type === "formula") return make("span", { class: "formula", text: span.text });
    if (span.type !== "link") return make(span.type, {}, ...buildSpans(span.spans));
    const attributes = { href: span.address, target: "_blank", rel: "noopener noreferrer nofollow", title: span.address };
    return make("a", attributes, ...buildSpans(span.spans));
  });
}

function buildCode(block) {
  const label = make("span", { text: block.language });
  const button = make("button", { class: "copy-code", type: "button" }, icon("copy"), make("span", { text: say("copy") }));
  const code = make("code", {}, document.createTextNode(block.text));
  button.addEventListener("click", async () => {
    button.lastElementChild.textContent = say((await copyText(code.textContent)) ? "copied" : "notCopied");
    setTimeout(() => (button.lastElementChild.textContent = say("copy")), 2_000);
  });
  return make("div", { class: "code-block" }, make("div", { class: "code-head" }, label, button), make("pre", { dir: "ltr" }, code));
}

function buildList(block) {
  const element = make(block.ordered ? "ol" : "ul", { class: block.loose ? "loose" : "", start: block.ordered && block.first !== 1 ? block.first : null });
  element.append(...block.items.map(buildItem));
  return element;
}

function buildItem(item) {
  const element = make("li", {}, ...item.blocks.map(build));
  if (item.checked === null) return element;
  const box = make("input", { type: "checkbox", disabled: true, checked: item.checked, "aria-label": say(item.checked ? "done" : "notDone") });
  element.classList.add("task");
  element.prepend(box);
  return element;
}

function buildTable(block) {
  const body = make("tbody", {}, ...block.rows.map((row) => buildRow("td", row, block.align)));
  return make("div", { class: "table-box", tabindex: "0" }, make("table", {}, make("thead", {}, buildRow("th", block.header, block.align)), body));
}

function buildRow(tag, cells, align) {
  return make("tr", {}, ...cells.map((cell, column) => make(tag, { class: align[column] && `to-${align[column]}` }, ...buildSpans(parseInline(cell)))));
}
