// The choice among the server's models, and their adapters.

import { make } from "./elements.js";
import { say } from "./words.js";

/** The select element in the page's head. */
export class ModelChoice {
  /**
   * @param {HTMLSelectElement} select
   * @param {function(string)} changed
   */
  constructor(select, changed) {
    this.select = select;
    this.models = [];
    select.addEventListener("change", () => changed(select.value));
  }

  /** Take what the server has: [{id, parent}]. */
  take(models) {
    this.models = models;
  }

  /** Return the id of the model that is chosen, or null if there is none. */
  get chosen() {
    return this.select.value === "" ? null : this.select.value;
  }

  /** Show the models, with one chosen: the wanted one if the server has it, else its first. */
  show(wanted) {
    const option = ({ id }) => make("option", { value: id, text: id });
    const bases = this.models.filter((model) => model.parent === null);
    const adapters = this.models.filter((model) => model.parent !== null);
    const parts = adapters.length === 0 ? bases.map(option) : [
      make("optgroup", { label: say("models") }, ...bases.map(option)),
      make("optgroup", { label: say("adapters") }, ...adapters.map(option)),
    ];
    if (parts.length === 0) parts.push(make("option", { value: "", text: wanted ?? say("noModels") }));
    this.select.replaceChildren(...parts);
    if (this.models.some((model) => model.id === wanted)) this.select.value = wanted;
    this.select.disabled = this.models.length === 0;
  }
}
