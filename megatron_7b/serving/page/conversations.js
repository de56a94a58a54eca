// Conversations as the browser keeps them: a record each, so that a damaged one takes no other with it.

const PREFIX = "megatron-7b.conversation.";
const FORMAT = "megatron-7b conversations";
const TITLE_LENGTH = 60;
const ENDS = ["stop", "length", "stopped", "cut", "error"];

/** Return storage of the browser that works, or null where it is switched off. */
export function workingStorage(get) {
  try {
    const storage = get();
    storage.setItem("megatron-7b.try", "");
    storage.removeItem("megatron-7b.try");
    return storage;
  } catch (error) {
    return error?.name === "QuotaExceededError" ? get() : null; // full, but it can be read
  }
}

/** Return a conversation without messages, which is not stored until it has some. */
export function newConversation(model = null, sampling = {}) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, model, system: "", sampling: { ...sampling }, sentFrom: 0, messages: [] };
}

function newId() {
  // randomUUID needs a secure context, and a server in the local network may have none
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");
}

/** The conversations of this browser, or of this tab where it keeps none. */
export class Conversations {
  /** @param {Storage|null} storage Where they are kept. */
  constructor(storage) {
    this.storage = storage;
    this.all = new Map();
    this.damaged = [];
    this.load();
  }

  /** Read all of them, as another tab may have changed them; those of `keep` stay as they are here. */
  load(keep = new Set()) {
    if (this.storage === null) return;
    const read = new Map([...this.all].filter(([id]) => keep.has(id)));
    this.damaged = [];
    for (const key of keysOf(this.storage)) {
      const conversation = parseConversation(this.storage.getItem(key));
      if (conversation === null || PREFIX + conversation.id !== key) this.damaged.push(key);
      else if (!read.has(conversation.id)) read.set(conversation.id, conversation);
    }
    this.all = read;
  }

  /** Return them, the one with the latest message first; of those with all words of a search only. */
  list(search = "") {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...this.all.values()].filter((conversation) => {
      if (words.length === 0) return true;
      const text = [conversation.title, ...conversation.messages.map(textOf)].join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    return found.sort((one, other) => other.updated - one.updated);
  }

  get(id) {
    return this.all.get(id) ?? null;
  }

  /** Keep a conversation; false where the browser has no room for it, and it lasts as long as the tab. */
  save(conversation) {
    this.all.set(conversation.id, conversation);
    if (this.storage === null) return true;
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }

  remove(id) {
    this.all.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  /** Return the records that could not be read, as text. */
  damagedText() {
    return this.damaged.map((key) => `${key}\n${this.storage.getItem(key)}`).join("\n\n");
  }

  discardDamaged() {
    for (const key of this.damaged) this.storage.removeItem(key);
    this.damaged = [];
  }

  /** Take the conversations of an export in; returns how many there were, and whether all could be kept. */
  take(text) {
    const conversations = parseExport(text);
    // The same conversation from elsewhere is a second one: neither overwrites the other.
    const news = conversations.map((one) => (this.all.has(one.id) ? { ...one, id: newId() } : one));
    const kept = news.map((one) => this.save(one));
    return { count: news.length, kept: kept.every(Boolean) };
  }
}

/** Tell whether a key of the storage is a conversation's. */
export function isConversationKey(key) {
  return key === null || key.startsWith(PREFIX);
}

function keysOf(storage) {
  return Array.from({ length: storage.length }, (_, index) => storage.key(index)).filter((key) => key.startsWith(PREFIX));
}

/** Return what a message says: for a reply, the version that is shown. */
export function textOf(message) {
  return message.role === "user" ? message.content : (message.versions[message.shown]?.content ?? "");
}

/** Return the messages that are sent to the model for a reply after the first `count` ones. */
export function messagesToSend(conversation, count = conversation.messages.length) {
  const sent = conversation.messages.slice(Math.min(conversation.sentFrom, Math.max(count - 1, 0)), count);
  const system = conversation.system.trim();
  const said = system === "" ? [] : [{ role: "system", content: system }];
  for (const message of sent) {
    const content = textOf(message);
    const last = said.at(-1);
    if (message.role === "assistant" && content === "") continue; // it failed
    if (message.role === "user" && last?.role === "user") last.content += `\n\n${content}`; // templates want turns
    else said.push({ role: message.role, content });
  }
  return said;
}

/** Return a title made of the first line of a message. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const characters = [...line.replace(/^[#>*`\-\s]+/, "")];
  return characters.length > TITLE_LENGTH ? `${characters.slice(0, TITLE_LENGTH).join("")}…` : characters.join("");
}

/**
 * Return the first message to send so that a conversation becomes short enough, or null if only its last one is left.
 *
 * @param {Object} conversation
 * @param {number} share The part of the text to keep, between 0 and 1.
 */
export function laterStart(conversation, share) {
  const { messages, sentFrom } = conversation;
  const starts = messages.flatMap((message, index) => (message.role === "user" && index > sentFrom ? [index] : []));
  if (starts.length === 0) return null;
  const lengthFrom = (index) => messages.slice(index).reduce((sum, message) => sum + textOf(message).length, 0);
  const room = share * lengthFrom(sentFrom);
  return starts.find((index) => lengthFrom(index) <= room) ?? starts.at(-1);
}

/** Return conversations as a text that `Conversations.take` reads. */
export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Return a conversation as Markdown, with a heading for each message. */
export function toMarkdown(conversation, you) {
  const parts = [`# ${conversation.title}`];
  if (conversation.system.trim() !== "") parts.push(`> ${conversation.system.trim().replaceAll("\n", "\n> ")}`);
  for (const message of conversation.messages) {
    const speaker = message.role === "user" ? you : (message.versions[message.shown]?.model ?? "assistant");
    parts.push(`## ${speaker}`, textOf(message).trim());
  }
  return `${parts.join("\n\n")}\n`;
}

function parseConversation(text) {
  try {
    return checked(JSON.parse(text));
  } catch {
    return null;
  }
}

function parseExport(text) {
  try {
    const { format, conversations } = JSON.parse(text);
    return format === FORMAT ? conversations.map(checked).filter((one) => one !== null) : [];
  } catch {
    return [];
  }
}

/** Return a conversation with fields of the right types and no others, or null if it is none. */
function checked(value) {
  if (!isObject(value) || typeof value.id !== "string" || !/^[\w-]{1,64}$/.test(value.id) || !Array.isArray(value.messages)) return null;
  const messages = value.messages.map(checkedMessage);
  if (messages.includes(null)) return null;
  return {
    id: value.id,
    title: text(value.title),
    named: value.named === true,
    created: number(value.created) ?? 0,
    updated: number(value.updated) ?? 0,
    model: typeof value.model === "string" ? value.model : null,
    system: text(value.system),
    sampling: checkedSampling(value.sampling),
    sentFrom: Math.max(0, Math.trunc(number(value.sentFrom) ?? 0)),
    messages,
  };
}

/** Return those of the sampling settings that are numbers. */
export function checkedSampling(value) {
  if (!isObject(value)) return {};
  return Object.fromEntries(Object.entries(value).filter(([name, one]) => /^[a-z_]{1,30}$/.test(name) && number(one) !== null));
}

function checkedMessage(value) {
  if (!isObject(value)) return null;
  if (value.role === "user" && typeof value.content === "string") return { role: "user", content: value.content };
  if (value.role !== "assistant" || !Array.isArray(value.versions)) return null;
  const versions = value.versions.map(checkedVersion);
  if (versions.length === 0 || versions.includes(null)) return null;
  const shown = Math.trunc(number(value.shown) ?? 0);
  return { role: "assistant", versions, shown: Math.min(Math.max(shown, 0), versions.length - 1) };
}

function checkedVersion(value) {
  if (!isObject(value) || typeof value.content !== "string") return null;
  const version = { content: value.content, model: typeof value.model === "string" ? value.model : null };
  version.end = ENDS.includes(value.end) ? value.end : "cut"; // one that was running when the tab closed
  if (isObject(value.error)) version.error = { kind: text(value.error.kind), detail: text(value.error.detail) };
  for (const name of ["firstToken", "seconds", "tokens"]) if (number(value[name]) !== null) version[name] = value[name];
  return version;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function text(value) {
  return typeof value === "string" ? value : "";
}

function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}
