// Conversations in the browser's storage, the server's stream, and the words. Run by tests/serving/test_page_modules.py.

import assert from "node:assert/strict";
import { test } from "node:test";
import { ApiError, Client, events } from "../../../megatron_7b/serving/page/api.js";
import { Conversations, laterStart, messagesToSend, newConversation, titleOf, toJson, toMarkdown, workingStorage } from "../../../megatron_7b/serving/page/conversations.js";
import { loadPreferences } from "../../../megatron_7b/serving/page/preferences.js";
import { Replies, rateOf } from "../../../megatron_7b/serving/page/replies.js";
import { allWords, firstLanguage, say, speak } from "../../../megatron_7b/serving/page/words.js";

/** localStorage, with room for some characters. */
class Storage {
  constructor(room = Infinity) {
    this.map = new Map();
    this.room = room;
  }
  get length() { return this.map.size; }
  key(index) { return [...this.map.keys()][index]; }
  getItem(key) { return this.map.get(key) ?? null; }
  removeItem(key) { this.map.delete(key); }
  setItem(key, value) {
    const used = [...this.map].reduce((sum, [other, text]) => sum + (other === key ? 0 : other.length + text.length), 0);
    if (used + key.length + value.length > this.room) throw Object.assign(new Error("full"), { name: "QuotaExceededError" });
    this.map.set(key, value);
  }
}

function conversationOf(...texts) {
  const conversation = newConversation("tiny");
  conversation.title = texts[0];
  conversation.messages = texts.map((content, index) =>
    index % 2 === 0 ? { role: "user", content } : { role: "assistant", shown: 0, versions: [{ content, model: "tiny", end: "stop" }] });
  return conversation;
}

test("a conversation is the same after a visit", () => {
  const storage = new Storage();
  const conversation = conversationOf("Question", "Answer");
  conversation.sampling = { temperature: 0.5 };
  assert.equal(new Conversations(storage).save(conversation), true);
  assert.deepEqual(new Conversations(storage).get(conversation.id), conversation);
});

test("a reply that was running when the tab closed was cut", () => {
  const storage = new Storage();
  const conversation = conversationOf("Question", "Ans");
  conversation.messages[1].versions[0].end = null;
  new Conversations(storage).save(conversation);
  assert.equal(new Conversations(storage).get(conversation.id).messages[1].versions[0].end, "cut");
});

test("damaged records take no other with them", () => {
  const storage = new Storage();
  const good = conversationOf("good");
  new Conversations(storage).save(good);
  const bad = ["{", "null", "[]", '"x"', '{"id":"../x","messages":[]}', '{"id":"bad5","messages":[{"role":"system","content":"x"}]}', '{"id":"other","messages":[]}', '{"id":"bad7","messages":[{"role":"assistant","versions":[]}]}'];
  bad.forEach((text, index) => storage.setItem(`megatron-7b.conversation.bad${index}`, text));
  const conversations = new Conversations(storage);
  assert.deepEqual(conversations.list().map((one) => one.id), [good.id]);
  assert.equal(conversations.damaged.length, bad.length);
  assert.ok(conversations.damagedText().includes('{"id":"../x"'));
  conversations.discardDamaged();
  assert.equal(storage.length, 1);
});

test("types that are wrong become those that are right", () => {
  const storage = new Storage();
  storage.setItem("megatron-7b.conversation.odd", JSON.stringify({ id: "odd", title: 5, updated: "x", system: null, sampling: { temperature: "hot", top_p: 0.5, "__proto__x!": 1 }, sentFrom: -3, messages: [{ role: "user", content: "x", html: "<b>" }] }));
  const odd = new Conversations(storage).get("odd");
  assert.deepEqual([odd.title, odd.updated, odd.system, odd.sampling, odd.sentFrom, odd.messages], ["", 0, "", { top_p: 0.5 }, 0, [{ role: "user", content: "x" }]]);
});

test("a full storage says so, and keeps what is there", () => {
  const storage = new Storage(2_000);
  const conversations = new Conversations(storage);
  const small = conversationOf("small");
  assert.equal(conversations.save(small), true);
  const large = conversationOf("x".repeat(5_000));
  assert.equal(conversations.save(large), false);
  assert.equal(conversations.get(large.id), large); // for as long as the tab is open
  assert.deepEqual(new Conversations(storage).list().map((one) => one.id), [small.id]);
});

test("a browser without storage gives one that lasts as long as the tab", () => {
  assert.equal(workingStorage(() => { throw new Error("SecurityError"); }), null);
  const conversations = new Conversations(null);
  assert.equal(conversations.save(conversationOf("x")), true);
  assert.equal(conversations.list().length, 1);
});

test("searching finds all words, in titles and messages", () => {
  const conversations = new Conversations(null);
  [conversationOf("Trains", "They run on rails"), conversationOf("张量并行", "切分矩阵")].forEach((one) => conversations.save(one));
  assert.deepEqual(conversations.list("RAILS trains").map((one) => one.title), ["Trains"]);
  assert.deepEqual(conversations.list("矩阵").map((one) => one.title), ["张量并行"]);
  assert.equal(conversations.list("absent").length, 0);
});

test("what is exported can be imported, beside what is there", () => {
  const conversation = conversationOf("a", "b");
  const conversations = new Conversations(new Storage());
  conversations.save(conversation);
  assert.deepEqual(conversations.take(toJson([conversation])), { count: 1, kept: true });
  assert.equal(conversations.all.size, 2); // neither overwrote the other
  for (const bad of ["", "{", "[]", '{"format":"x"}', '{"format":"megatron-7b conversations","conversations":{}}']) assert.equal(conversations.take(bad).count, 0);
  assert.equal(toMarkdown(conversation, "You"), "# a\n\n## You\n\na\n\n## tiny\n\nb\n");
});

test("what is sent to the model", () => {
  const conversation = conversationOf("one", "1", "two", "2", "three");
  conversation.system = " be brief ";
  const contents = (count) => messagesToSend(conversation, count).map((one) => one.content);
  assert.deepEqual(contents(), ["be brief", "one", "1", "two", "2", "three"]);
  assert.deepEqual(contents(3), ["be brief", "one", "1", "two"]);
  conversation.sentFrom = 2;
  assert.deepEqual(contents(), ["be brief", "two", "2", "three"]);
  conversation.sentFrom = 99;
  assert.deepEqual(contents(), ["be brief", "three"]);
  conversation.sentFrom = 0;
  conversation.messages[3].versions[0].content = ""; // an attempt that failed: no two questions in a row
  assert.deepEqual(contents(), ["be brief", "one", "1", "two\n\nthree"]);
});

test("the oldest turns are left out until the rest fits", () => {
  const conversation = conversationOf("a".repeat(50), "b".repeat(50), "c".repeat(50), "d".repeat(50), "e");
  assert.equal(laterStart(conversation, 0.6), 2);
  assert.equal(laterStart(conversation, 0.2), 4);
  assert.equal(laterStart({ ...conversation, sentFrom: 4 }, 0.5), null);
});

test("titles are short, of one line, and cut between characters", () => {
  assert.equal(titleOf("  # Title\nmore"), "Title");
  assert.equal(titleOf("😀".repeat(80)), `${"😀".repeat(60)}…`);
});

test("preferences that are damaged are those of a first visit", () => {
  const storage = new Storage();
  for (const text of ["{", "null", "[1]", '{"theme":"pink","sampling":[1],"model":{}}']) {
    storage.setItem("megatron-7b.preferences", text);
    assert.deepEqual(loadPreferences(storage), loadPreferences(null));
  }
});

// ------------------------------------------------------------------------------------------------ the stream

function streamOf(bytes, size) {
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
}

test("events are the same wherever the network cuts them", async () => {
  const bytes = new TextEncoder().encode('data: {"a":"量😀"}\r\n\r\n: comment\n\ndata:two\ndata: lines\n\nevent: x\ndata: [DONE]\n\n');
  for (let size = 1; size <= bytes.length; size += 1) {
    const found = [];
    for await (const data of events(streamOf(bytes, size), null)) found.push(data);
    assert.deepEqual(found, ['{"a":"量😀"}', "two\nlines", "[DONE]"]);
  }
});

async function replyOf(response) {
  const fetched = globalThis.fetch;
  globalThis.fetch = async () => (response instanceof Error ? Promise.reject(response) : response);
  try {
    const found = [];
    for await (const piece of new Client(null).reply({ model: "m", messages: [] }, new AbortController().signal)) found.push(piece);
    return found;
  } finally {
    globalThis.fetch = fetched;
  }
}

const sse = (...chunks) => new Response(chunks.map((chunk) => `data: ${typeof chunk === "string" ? chunk : JSON.stringify(chunk)}\n\n`).join(""));

test("a reply has pieces, an end and a length", async () => {
  const found = await replyOf(sse({ choices: [{ delta: { role: "assistant", content: "" } }] }, { choices: [{ delta: { content: "Hi" } }] }, { choices: [{ delta: {}, finish_reason: "length" }] }, { choices: [], usage: { completion_tokens: 1 } }, "[DONE]"));
  assert.deepEqual(found, [{ text: "Hi" }, { end: "length" }, { tokens: 1 }]);
});

const FAILURES = [
  ["unreachable", new TypeError("fetch failed")],
  ["cut", sse({ choices: [{ delta: { content: "Hi" } }] })],
  ["failed", sse({ error: { message: "broken", code: 500 } })],
  ["key", new Response('{"error":{"message":"no key"}}', { status: 401 })],
  ["busy", new Response('{"error":{"message":"full"}}', { status: 429, headers: { "Retry-After": "7" } })],
  ["tooLong", new Response('{"error":{"message":"x","code":"context_length_exceeded"}}', { status: 400 })],
  ["tooLong", new Response('{"error":{"message":"maximum context length is 5 tokens"}}', { status: 400 })],
  ["noModel", new Response('{"error":{"message":"x","code":"model_not_found"}}', { status: 404 })],
  ["refused", new Response('{"error":{"message":"temperature -1"}}', { status: 400 })],
  ["failed", new Response("<html>not json", { status: 500 })],
  ["unreachable", new Response("<html>bad gateway", { status: 502 })],
];

for (const [kind, response] of FAILURES) {
  test(`failure: ${kind} ${response.status ?? ""}`, async () => {
    await assert.rejects(replyOf(response), (error) => error instanceof ApiError && error.kind === kind && (kind !== "busy" || error.wait === 7));
  });
}

test("a failed attempt is replaced by the next, a reply is kept beside it", async () => {
  const scripts = [[new ApiError("busy", "full", 3)], [{ text: "one" }, { end: "stop" }], [{ text: "two" }, { tokens: 9 }, { end: "length" }]];
  const client = { async *reply() { for (const piece of scripts.shift()) { if (piece instanceof Error) throw piece; yield piece; } } };
  const told = [];
  const replies = new Replies(client, { grew: () => told.push("grew"), ended: () => told.push("ended") });
  const conversation = conversationOf("question");
  await replies.start(conversation, 1, "tiny");
  assert.deepEqual(conversation.messages[1].versions.map(({ end, error }) => [end, error]), [["error", { kind: "busy", detail: "full", wait: 3 }]]);
  await replies.start(conversation, 1, "tiny");
  await replies.start(conversation, 1, "tiny");
  assert.deepEqual(conversation.messages[1].versions.map(({ content, end }) => [content, end]), [["one", "stop"], ["two", "length"]]);
  assert.equal(conversation.messages[1].shown, 1);
  assert.equal(conversation.messages[1].versions[1].tokens, 9);
  assert.equal(replies.isRunning(conversation.id), false);
  assert.equal(told.filter((one) => one === "ended").length, 3);
});

test("a rate is told where there is one", () => {
  assert.equal(rateOf({ tokens: 21, seconds: 2 }), 10);
  for (const version of [{}, { tokens: 1, seconds: 2 }, { tokens: 5, seconds: 0 }]) assert.equal(rateOf(version), null);
});

// ------------------------------------------------------------------------------------------------ words

test("all languages say the same things, with the same values", () => {
  const { en, ...others } = allWords();
  const holes = (text) => [...text.matchAll(/\{\w+\}/g)].map(String).sort();
  for (const words of Object.values(others)) {
    assert.deepEqual(Object.keys(words), Object.keys(en));
    for (const [name, text] of Object.entries(words)) assert.deepEqual(holes(text), holes(en[name]), name);
  }
});

test("the language is the chosen one, else the browser's first that is spoken", () => {
  assert.equal(firstLanguage("", ["fr", "zh-Hant-TW", "en"]), "zh");
  assert.equal(firstLanguage("en", ["zh"]), "en");
  assert.equal(firstLanguage("constructor", []), "en");
  speak("zh");
  assert.equal(say("version", { shown: 1, count: 2 }), "1 / 2");
});
