// Replies while they are written: one for each conversation at most, also of those that are not looked at.

import { ApiError } from "./api.js";
import { messagesToSend } from "./conversations.js";

/** Starts, follows and stops replies. */
export class Replies {
  /**
   * @param {Client} client
   * @param {{grew: function, ended: function}} listener Is told of each piece, and of the end: (conversation, message).
   */
  constructor(client, listener) {
    this.client = client;
    this.listener = listener;
    this.running = new Map();
  }

  isRunning(id) {
    return this.running.has(id);
  }

  /** Return the ids of the conversations in which a reply is being written. */
  ids() {
    return new Set(this.running.keys());
  }

  stop(id) {
    this.running.get(id)?.abort();
  }

  /**
   * Have a model write the message at a position: a new one, or another version of one that is there.
   *
   * @param {Object} conversation
   * @param {number} position
   * @param {string} model
   */
  async start(conversation, position, model) {
    const stopping = new AbortController();
    this.running.set(conversation.id, stopping);
    const message = (conversation.messages[position] ??= { role: "assistant", versions: [], shown: 0 });
    message.versions = message.versions.filter((one) => one.content !== "" || one.end === "stop"); // no failed attempts
    const version = { content: "", model, end: null };
    const body = { model, messages: messagesToSend(conversation, position), ...conversation.sampling };
    message.versions.push(version);
    message.shown = message.versions.length - 1;
    this.listener.grew(conversation, message);
    try {
      await this.follow(version, this.client.reply(body, stopping.signal), () => this.listener.grew(conversation, message));
    } catch (error) {
      if (stopping.signal.aborted) version.end = "stopped";
      else recordError(version, error);
    }
    this.running.delete(conversation.id);
    this.listener.ended(conversation, message);
  }

  /** Put the pieces of a reply into a version, with the times that are told about it. */
  async follow(version, pieces, grew) {
    const started = performance.now();
    let first = null;
    let count = 0;
    for await (const piece of pieces) {
      const now = performance.now();
      if (piece.text !== undefined) {
        first ??= now;
        count += 1;
        version.content += piece.text;
        version.firstToken = (first - started) / 1_000;
        version.seconds = (now - first) / 1_000;
        version.tokens = count;
        grew();
      }
      if (piece.tokens !== undefined) version.tokens = piece.tokens;
      if (piece.end !== undefined) version.end = piece.end === "length" ? "length" : "stop";
    }
    version.end ??= "stop";
  }
}

function recordError(version, error) {
  const known = error instanceof ApiError ? error : new ApiError("failed", String(error?.message ?? error));
  version.end = known.kind === "cut" ? "cut" : "error";
  version.error = { kind: known.kind, detail: known.detail };
  if (known.wait !== null) version.error.wait = known.wait;
}

/** Return the tokens per second of a version after its first one, or null if that says nothing. */
export function rateOf(version) {
  return version.tokens > 1 && version.seconds > 0.05 ? (version.tokens - 1) / version.seconds : null;
}
