// The messages of the conversation that is looked at.

import { messagesToSend } from "./conversations.js";
import { copyText, icon, iconButton, isComposing, make, textButton } from "./elements.js";
import { MarkdownView } from "./markdown_view.js";
import { rateOf } from "./replies.js";
import { say } from "./words.js";

const NEAR_END = 80; // pixels from the end within which the view follows what is written
const DRAWING_SHARE = 0.25; // of the time is spent on drawing a reply that grows, at most

/** Draws messages, and follows the one that is being written. */
export class Thread {
  /**
   * @param {{element: HTMLElement, scroller: HTMLElement, toEnd: HTMLElement}} places
   * @param {Object} actions What its buttons do: again(position), edit(position, text), show(position, version),
   *   dropOldest(position), sendAll(), enterKey(position).
   */
  constructor(places, actions) {
    Object.assign(this, places);
    this.actions = actions;
    this.conversation = null;
    this.isRunning = () => false;
    this.following = true;
    this.turns = [];
    this.drawing = null;
    this.cost = 0;
    this.top = 0;
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.toEnd.addEventListener("click", () => this.goToEnd());
  }

  /** Draw a conversation from its beginning. */
  show(conversation, running) {
    const isOther = conversation !== this.conversation;
    const before = new Map(isOther ? [] : this.turns.map((turn) => [turn.message, turn]));
    this.conversation = conversation;
    this.running = running;
    clearTimeout(this.drawing);
    this.drawing = null;
    clearInterval(this.clock);
    this.turns = conversation.messages.map((message, position) => this.turnOf(message, position, before.get(message)));
    this.place(this.turns.flatMap((turn, position) => [this.divider(position), turn.element]).filter(Boolean));
    this.element.setAttribute("aria-busy", String(running));
    if (running) this.clock = setInterval(() => this.tellTime(), 1_000);
    if (isOther || this.following) this.goToEnd();
  }

  /** Have the thread hold some elements; those at its beginning that stay are not touched, nor laid out again. */
  place(elements) {
    let same = 0;
    for (let child = this.element.firstElementChild; child !== null && child === elements[same]; child = child.nextElementSibling) same += 1;
    while (this.element.childElementCount > same) this.element.lastElementChild.remove();
    this.element.append(...elements.slice(same));
  }

  divider(position) {
    const { sentFrom } = this.conversation;
    if (position === 0 || position !== sentFrom) return null;
    return make("div", { class: "divider" }, make("span", { text: say("notSent") }), textButton(say("sendThem"), () => this.actions.sendAll(), { class: "text-button" }));
  }

  /** Return the turn of a message: the one that was there, if it can stay, as it may be long. */
  turnOf(message, position, before) {
    if (before === undefined || before.position !== position || (before.said !== undefined && before.said !== message.content)) {
      return this.buildTurn(message, position);
    }
    if (message.role === "assistant") this.fill(before);
    return before;
  }

  buildTurn(message, position) {
    return message.role === "user" ? this.buildQuestion(message, position) : this.buildReply(message, position);
  }

  buildQuestion(message, position) {
    const actions = make("div", { class: "actions" }, copyButton(() => message.content));
    actions.append(iconButton("edit", say("edit"), () => this.edit(position), { class: "icon-button unless-busy" }));
    const bubble = make("div", { class: "bubble", dir: "auto", text: message.content });
    const element = make("article", { class: "turn question", "aria-label": say("you") }, bubble, actions);
    return { element, message, position, said: message.content };
  }

  buildReply(message, position) {
    const markdown = make("div", { class: "markdown" });
    const note = make("div", { class: "note" });
    const actions = make("div", { class: "actions" });
    const element = make("article", { class: "turn reply" }, markdown, note, actions);
    const turn = { element, note, actions, message, position, view: new MarkdownView(markdown) };
    this.fill(turn);
    return turn;
  }

  /** Bring a reply's turn up to what its message says. */
  fill(turn) {
    const version = turn.message.versions[turn.message.shown];
    if (turn.version !== version) Object.assign(turn, { version, begun: performance.now() });
    const writing = version.end === null;
    turn.view.update(version.content);
    turn.element.setAttribute("aria-label", version.model ?? "");
    turn.element.classList.toggle("writing", writing && version.content !== "");
    if (writing && version.content === "") turn.note.replaceChildren(waiting(turn));
    else turn.note.replaceChildren(...this.noteOf(turn, version));
    if (writing) turn.actions.replaceChildren(statistics(version));
    else turn.actions.replaceChildren(...this.actionsOf(turn, version), statistics(version));
  }

  /** Have everything built anew when it is shown next, in another language. */
  forget() {
    this.turns = [];
  }

  actionsOf(turn, version) {
    const { message, position } = turn;
    const buttons = version.content === "" ? [] : [copyButton(() => version.content)];
    const failed = version.error !== undefined; // its note has buttons of its own
    if (!this.running && !failed) buttons.push(iconButton("again", say("again"), () => this.actions.again(position)));
    const count = message.versions.length;
    if (count > 1 && !this.running) {
      const go = (step) => () => this.actions.show(position, message.shown + step);
      buttons.push(
        iconButton("before", say("earlierVersion"), go(-1), { disabled: message.shown === 0 }),
        make("span", { class: "version", text: say("version", { shown: message.shown + 1, count }) }),
        iconButton("after", say("laterVersion"), go(1), { disabled: message.shown === count - 1 }),
      );
    }
    return buttons;
  }

  /** Return what is to be said below a reply: why it ended early, and what can be done. */
  noteOf(turn, version) {
    if (version.end === "length") return [make("p", { class: "quiet", text: say("atLimit") })];
    if (version.end === "stopped") return [make("p", { class: "quiet", text: say("wasStopped") })];
    if (version.end !== "error" && version.end !== "cut") return [];
    const { kind, detail, wait } = version.error ?? { kind: "cut", detail: "" };
    const alone = kind === "tooLong" && messagesToSend(this.conversation, turn.position).filter((one) => one.role === "user").length < 2;
    const text = make("p", { text: alone ? say("aloneTooLong") : sentenceOf(kind, wait, version.model) });
    const box = make("div", { class: "problem" }, icon("warning"), make("div", {}, text));
    if (detail) box.lastElementChild.append(make("p", { class: "quiet", text: detail }));
    if (!this.running) box.lastElementChild.append(make("div", { class: "buttons" }, ...this.remedies(turn.position, kind, alone)));
    return [box];
  }

  remedies(position, kind, alone) {
    const again = textButton(say("tryAgain"), () => this.actions.again(position));
    if (kind === "key") return [textButton(say("keyTitle"), () => this.actions.enterKey(position), { class: "button primary" })];
    if (kind === "tooLong" && alone) return [textButton(say("edit"), () => this.edit(position - 1)), again];
    if (kind === "tooLong") return [textButton(say("dropOldest"), () => this.actions.dropOldest(position), { class: "button primary" })];
    return [again];
  }

  /** Draw what has been written since, when there is time for it. */
  grew(conversation, message) {
    if (conversation !== this.conversation || this.drawing !== null) return;
    const turn = this.turns.find((one) => one.message === message);
    if (turn === undefined) return;
    const pause = Math.min(Math.max(this.cost * (1 / DRAWING_SHARE - 1), 30), 2_000);
    this.drawing = setTimeout(() => {
      this.drawing = null;
      const started = performance.now();
      this.fill(turn);
      if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight; // has the browser lay out, which counts
      this.cost = performance.now() - started;
    }, pause);
  }

  tellTime() {
    const turn = this.turns.find((one) => one.version?.end === null);
    if (turn !== undefined) this.grew(this.conversation, turn.message);
  }

  /** Have the message at a position edited in place. */
  edit(position) {
    const turn = this.turns[position];
    const message = this.conversation.messages[position];
    const area = make("textarea", { class: "editing", "aria-label": say("yourMessage"), value: message.content });
    const restore = () => {
      this.turns[position] = this.buildTurn(message, position);
      form.replaceWith(this.turns[position].element);
      this.turns[position].element.querySelector(".actions button:last-child")?.focus();
    };
    const send = () => area.value.trim() !== "" && this.actions.edit(position, area.value);
    const buttons = make("div", { class: "buttons" }, textButton(say("cancel"), restore), textButton(say("send"), send, { class: "button primary" }));
    const form = make("div", { class: "turn question" }, area, buttons);
    area.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") restore();
      else if (event.key === "Enter" && !event.shiftKey) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    turn.element.replaceWith(form);
    turn.element = form;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  /** Have the last question edited; false if there is none. */
  editLast() {
    const position = this.conversation.messages.findLastIndex((message) => message.role === "user");
    if (position >= 0 && !this.running) this.edit(position);
    return position >= 0;
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    const isNear = scrollHeight - scrollTop - clientHeight < NEAR_END;
    if (isNear || scrollTop < this.top) this.following = isNear; // what grows by itself is followed on
    this.top = scrollTop;
    this.toEnd.hidden = isNear || this.following;
  }

  goToEnd() {
    this.following = true;
    this.toEnd.hidden = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

function copyButton(getText) {
  const button = iconButton("copy", say("copy"), async () => {
    const copied = await copyText(getText());
    button.replaceChildren(icon(copied ? "done" : "warning"));
    button.setAttribute("aria-label", say(copied ? "copied" : "notCopied"));
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", say("copy"));
    }, 2_000);
  });
  return button;
}

function waiting(turn) {
  const seconds = Math.floor((performance.now() - turn.begun) / 1_000);
  const dots = make("span", { class: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
  return make("p", { class: "quiet waiting" }, dots, seconds >= 3 ? say("waiting", { seconds }) : null);
}

function statistics(version) {
  const parts = [];
  const rate = rateOf(version);
  if (rate !== null) parts.push(say("rate", { rate: rate.toFixed(rate < 10 ? 1 : 0) }));
  if (version.firstToken !== undefined) parts.push(say("firstToken", { seconds: version.firstToken.toFixed(2) }));
  if (version.tokens !== undefined && version.end !== null) parts.push(say("tokens", { count: version.tokens }));
  return make("span", { class: "statistics", text: parts.join(" · ") });
}

function sentenceOf(kind, wait, model) {
  if (kind === "key") return say("needsKey");
  if (kind === "busy" && wait) return say("busyFor", { seconds: wait });
  const known = ["unreachable", "busy", "tooLong", "noModel", "refused", "failed", "cut", "tooSlow"];
  return say(known.includes(kind) ? kind : "failed", { model });
}

