// The page: what belongs to what. Its parts draw themselves; this says what happens between them.

import { ApiError, Client } from "./api.js";
import { Composer } from "./composer.js";
import { Conversations, isConversationKey, laterStart, newConversation, textOf, titleOf, toJson, toMarkdown, workingStorage } from "./conversations.js";
import { byId, saveFile } from "./elements.js";
import { ModelChoice } from "./model_choice.js";
import { announce, hideBanner, showBanner, showToast } from "./notices.js";
import { loadPreferences, savePreferences } from "./preferences.js";
import { Replies } from "./replies.js";
import { SettingsPanel, askForKey } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";
import { drawWelcome, translatePage } from "./welcome.js";
import { firstLanguage, say, speak } from "./words.js";

const SAVING_SECONDS = 2; // between records of a reply that is being written
const ANNOUNCED = 400; // characters of a finished reply that screen readers say

const storage = workingStorage(() => localStorage);
const client = new Client(workingStorage(() => sessionStorage));
const preferences = loadPreferences(storage);
preferences.language = firstLanguage(preferences.language, navigator.languages);

const conversations = new Conversations(storage);
const replies = new Replies(client, { grew, ended });
const models = new ModelChoice(byId("model"), (model) => {
  current.model = model;
  remember("model", model);
  keep(current, false);
});
const thread = new Thread(
  { element: byId("thread"), scroller: byId("scroller"), toEnd: byId("to-end") },
  { again, edit, show: showVersion, dropOldest, sendAll, enterKey },
);
const sidebar = new Sidebar(
  { list: byId("conversations"), search: byId("search") },
  { open: openConversation, rename, save: saveConversation, remove },
);
const composer = new Composer({ send, stop: () => replies.stop(current.id), editLast: () => thread.editLast() });
const settings = new SettingsPanel(byId("settings-panel"), {
  changed: (conversation) => {
    remember("sampling", conversation.sampling);
    keep(conversation, false);
  },
  prefer,
  exportAll: () => saveFile("conversations.json", toJson(conversations.list()), "application/json"),
  importFile,
  deleteAll,
  hasKey: () => client.key !== "",
  forgetKey: () => {
    client.useKey("");
    settings.show(current, preferences);
  },
});

let current = newConversation(null, preferences.sampling);
let saved = 0;
let asking = null; // the API key, while its dialog is open
let watching = false;

// ------------------------------------------------------------------------------------------------ what is shown

function draw() {
  const running = replies.isRunning(current.id);
  thread.show(current, running);
  composer.show(running);
  models.show(current.model ?? preferences.model);
  drawWelcome(byId("welcome"), current.messages.length === 0, models.chosen, (text) => composer.put(text));
  byId("title").textContent = current.title || say("newConversation");
  document.title = current.title ? `${current.title} – megatron_7b` : "megatron_7b";
  drawList();
}

function drawList() {
  sidebar.show(conversations, current.id, replies.ids());
}

function drawAll() {
  translatePage();
  thread.forget();
  draw();
}

function prefer(name, value) {
  remember(name, value);
  if (name === "language") speak(value);
  showTheme();
  drawAll();
  if (byId("settings-panel").open) settings.show(current, preferences);
}

function remember(name, value) {
  preferences[name] = value;
  savePreferences(storage, preferences);
}

function showTheme() {
  document.documentElement.dataset.theme = preferences.theme;
}

// ------------------------------------------------------------------------------------------------ conversations

function openConversation(id) {
  const found = id === null ? null : conversations.get(id);
  current = found ?? newConversation(models.chosen, preferences.sampling);
  const hash = found === null ? "" : `#${current.id}`;
  if (location.hash !== hash) history.pushState(null, "", hash === "" ? location.pathname : hash);
  showList(false);
  draw();
  composer.focus();
}

function openFromAddress() {
  const found = conversations.get(location.hash.slice(1));
  if (found !== null) current = found;
  else if (current.messages.length > 0) current = newConversation(models.chosen, preferences.sampling);
  draw();
}

/** Keep a conversation in the browser. */
function keep(conversation, isNews = true) {
  if (isNews) conversation.updated = Date.now();
  if (conversation.messages.length === 0) return;
  if (!conversations.save(conversation)) showBanner(say("full"), [say("exportAll"), () => saveFile("conversations.json", toJson(conversations.list()), "application/json")], [say("close"), hideBanner]);
}

function rename(id, title) {
  const conversation = conversations.get(id);
  if (conversation !== null) {
    Object.assign(conversation, { title, named: true });
    keep(conversation, false);
  }
  draw();
}

function saveConversation(id) {
  const conversation = conversations.get(id);
  const name = conversation.title.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation";
  saveFile(`${name}.md`, toMarkdown(conversation, say("you")), "text/markdown");
}

function remove(id) {
  const conversation = conversations.get(id);
  replies.stop(id);
  conversations.remove(id);
  if (id === current.id) openConversation(null);
  else drawList();
  showToast(say("deleted"), () => {
    keep(conversation, false);
    openConversation(id);
  });
}

function deleteAll() {
  const all = conversations.list();
  all.forEach(({ id }) => {
    replies.stop(id);
    conversations.remove(id);
  });
  byId("settings-panel").close();
  openConversation(null);
  showToast(say("allDeleted"), () => {
    all.forEach((conversation) => keep(conversation, false));
    draw();
  });
}

async function importFile(file) {
  const { count, kept } = conversations.take(await file.text());
  showToast(count > 0 ? say("imported", { count }) : say("notImported"));
  if (!kept) showBanner(say("full"), [say("close"), hideBanner]);
  byId("settings-panel").close();
  draw();
}

// ------------------------------------------------------------------------------------------------ replies

function send(text) {
  if (replies.isRunning(current.id)) return false;
  if (current.messages.length === 0) {
    if (!current.named) current.title = titleOf(text);
    history.pushState(null, "", `#${current.id}`);
  }
  current.messages.push({ role: "user", content: text });
  start(current.messages.length);
  return true;
}

function start(position) {
  const conversation = current;
  conversation.model = models.chosen ?? conversation.model ?? preferences.model;
  thread.following = true;
  announce(say("writing"));
  replies.start(conversation, position, conversation.model ?? "");
  keep(conversation);
  draw();
}

function again(position) {
  withUndo(position + 1);
  start(position);
}

function edit(position, text) {
  withUndo(position + 1);
  current.messages[position] = { role: "user", content: text };
  if (position === 0 && !current.named) current.title = titleOf(text);
  current.messages.length = position + 1;
  current.sentFrom = Math.min(current.sentFrom, position);
  start(position + 1);
}

/** Leave the messages from a position on out; offer them back where that loses anything. */
function withUndo(position) {
  const conversation = current;
  const before = structuredClone(conversation.messages);
  const lost = before.slice(position).some((message) => textOf(message) !== "");
  conversation.messages.length = Math.min(position, conversation.messages.length);
  if (!lost) return;
  showToast(say("laterRemoved"), () => {
    replies.stop(conversation.id);
    conversation.messages = before;
    keep(conversation, false);
    draw();
  });
}

function showVersion(position, version) {
  current.messages[position].shown = version;
  keep(current, false);
  draw();
}

function dropOldest(position) {
  const { error } = current.messages[position].versions.at(-1);
  current.sentFrom = laterStart(current, shareThatFits(error?.detail ?? "")) ?? current.sentFrom;
  again(position);
}

/** Return the part of the text that fits, from what the server says about its limit and the length; else a half. */
function shareThatFits(detail) {
  const limit = Number(/context(?: length)? is (\d+)/.exec(detail)?.[1]);
  const total = Math.max(...(detail.match(/\d+/g) ?? []).map(Number));
  return limit < total ? (limit / total) * 0.8 : 0.5; // the reply needs room, too
}

function sendAll() {
  current.sentFrom = 0;
  keep(current, false);
  draw();
}

function grew(conversation, message) {
  thread.grew(conversation, message);
  if (Date.now() - saved < SAVING_SECONDS * 1_000) return;
  saved = Date.now();
  keep(conversation);
}

function ended(conversation, message) {
  const version = message.versions[message.shown];
  if (conversations.get(conversation.id) !== null) keep(conversation); // it may have been deleted meanwhile
  if (version.error?.kind === "unreachable") watchServer();
  if (conversation !== current) return drawList();
  draw();
  if (version.error === undefined) announce(`${say("replied")} ${version.content.slice(0, ANNOUNCED)}`);
  else announce(byId("thread").querySelector(".turn:last-child .problem p")?.textContent ?? "");
  if (version.error?.kind === "key") enterKey(conversation.messages.indexOf(message));
  if (version.error?.kind === "noModel") connect();
  return undefined;
}

// ------------------------------------------------------------------------------------------------ the server

/** Learn which models there are. */
async function connect() {
  try {
    models.take(await client.models());
    hideBanner();
    draw();
    if (models.chosen === null) showBanner(say("cannotChat"), [say("tryAgain"), connect]);
  } catch (error) {
    const kind = error instanceof ApiError ? error.kind : "failed";
    if (kind === "key") await enterKey(null);
    else if (kind === "unreachable") watchServer();
    else showBanner(`${say(kind)} ${error.detail ?? ""}`, [say("tryAgain"), connect]);
  }
}

async function enterKey(position) {
  if (asking !== null) return;
  const conversation = current;
  asking = askForKey(byId("key-dialog"), client.key !== "");
  const key = await asking;
  asking = null;
  if (key === null) {
    if (position === null) showBanner(say("needsKey"), [say("keyTitle"), () => enterKey(null)]);
    return;
  }
  client.useKey(key);
  await connect();
  if (position !== null && conversation === current) again(position);
}

/** Say that the server is away, and wait until it is back. */
async function watchServer() {
  if (watching) return;
  watching = true;
  showBanner(say("reconnecting"));
  for (let seconds = 1; !(await client.isUp()); seconds = Math.min(seconds * 1.5, 15)) {
    await new Promise((resolve) => setTimeout(resolve, seconds * 1_000));
  }
  watching = false;
  hideBanner();
  showToast(say("isBack"));
  await connect();
}

// ------------------------------------------------------------------------------------------------ the window

function showList(shown) {
  document.body.classList.toggle("list-open", shown);
  byId("shade").hidden = !shown;
}

function toggleList() {
  if (matchMedia("(max-width: 800px)").matches) return showList(!document.body.classList.contains("list-open"));
  remember("listHidden", document.body.classList.toggle("list-hidden"));
  return undefined;
}

function pressed(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const typing = event.target.closest?.("input, textarea, select") !== null;
  if (event.key === "Escape" && document.body.classList.contains("list-open")) showList(false);
  else if (event.key === "Escape" && replies.isRunning(current.id)) replies.stop(current.id);
  else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.code === "KeyO") openConversation(null);
  else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) composer.focus();
  else return;
  event.preventDefault();
}

function changedElsewhere(event) {
  if (event.storageArea !== storage || !isConversationKey(event.key)) return;
  conversations.load(replies.ids());
  current = conversations.get(current.id) ?? (current.messages.length === 0 || replies.isRunning(current.id) ? current : newConversation(models.chosen, preferences.sampling));
  draw();
}

function tellWhatIsWrong() {
  if (storage === null) return showBanner(say("noStorage"), [say("close"), hideBanner]);
  const count = conversations.damaged.length;
  if (count === 0) return undefined;
  const discard = () => {
    conversations.discardDamaged();
    hideBanner();
  };
  const save = () => saveFile("damaged-conversations.txt", conversations.damagedText(), "text/plain");
  return showBanner(say("damaged", { count }), [say("saveDamaged"), save], [say("discard"), discard]);
}

byId("new-conversation").addEventListener("click", () => openConversation(null));
byId("open-sidebar").addEventListener("click", toggleList);
byId("close-sidebar").addEventListener("click", toggleList);
byId("shade").addEventListener("click", () => showList(false));
byId("open-settings").addEventListener("click", () => settings.show(current, preferences));
byId("language").addEventListener("click", () => prefer("language", preferences.language === "zh" ? "en" : "zh"));
addEventListener("keydown", pressed);
addEventListener("popstate", openFromAddress);
addEventListener("storage", changedElsewhere);
addEventListener("pagehide", () => replies.ids().forEach((id) => conversations.get(id) && conversations.save(conversations.get(id))));

speak(preferences.language);
showTheme();
document.body.classList.toggle("list-hidden", preferences.listHidden);
openFromAddress();
translatePage();
connect().then(tellWhatIsWrong);
composer.focus();
