// The field in which messages are written.

import { byId, isComposing } from "./elements.js";

/** The message field with its buttons. */
export class Composer {
  /** @param {{send: function(string): boolean, stop: function, editLast: function(): boolean}} actions */
  constructor(actions) {
    this.actions = actions;
    this.field = byId("question");
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => this.pressed(event));
    addEventListener("resize", () => this.fit());
    byId("send").addEventListener("click", () => this.send());
    byId("stop").addEventListener("click", () => this.actions.stop());
    this.fit();
  }

  /** Show whether a reply can be asked for, or stopped. */
  show(running) {
    const stopFocused = document.activeElement === byId("stop");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (stopFocused && !running) this.focus();
  }

  focus() {
    if (!isTouched()) this.field.focus(); // a keyboard that comes up unasked hides half of a phone's page
  }

  /** Put a text into the field, to be sent or changed. */
  put(text) {
    this.field.value = text;
    this.fit();
    this.field.focus();
  }

  pressed(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey && !isTouched()) this.send();
    else if (event.key === "ArrowUp" && this.field.value === "" && this.actions.editLast()) ;
    else return;
    event.preventDefault();
  }

  send() {
    const text = this.field.value.trim();
    if (text === "" || !this.actions.send(text)) return;
    this.field.value = "";
    this.fit();
    this.focus();
  }

  /** Let the field be as high as its text; the style sheet has the limits. */
  fit() {
    byId("send").disabled = this.field.value.trim() === "";
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }
}

/** Tell whether the page is used with a finger: Enter makes lines there, as in other apps. */
function isTouched() {
  return matchMedia("(pointer: coarse)").matches;
}
