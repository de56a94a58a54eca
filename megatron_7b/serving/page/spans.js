// The spans of a paragraph of Markdown (emphasis, code, links, formulas), as plain data.
//
// As CommonMark and GFM have them, but that `**` works beside Chinese punctuation, that pictures are links (nothing is
// loaded from elsewhere), and that HTML is text.

export const MAX_INLINE = 20_000; // characters of one paragraph in which markup is looked for
const MAX_OPEN = 32; // emphases within one another
const MAX_LABEL = 1_000;
const MAX_ADDRESS = 2_000;

const SPECIAL = /[\\`*_~[!<$]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const BARE = /https?:\/\/[^\s<>"'`|\\^{}\u3000-\u303f\uff00-\uffef\u2018-\u201d]+/y;

/**
 * Return an address that may be linked to, or null: whole ones of http, https and mailto only.
 *
 * @param {string} address
 * @returns {string|null}
 */
export function safeAddress(address) {
  if (/[\u0000-\u0020\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\\]/.test(address)) return null;
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const parsed = new URL(address);
    return ["http:", "https:", "mailto:"].includes(parsed.protocol) ? parsed.href : null;
  } catch {
    return null;
  }
}

/**
 * Divide the text of a paragraph, heading or cell into spans.
 *
 * @param {string} text
 * @param {boolean} links Whether links are looked for; they are not within links.
 * @returns {Array<Object>} Spans: {type: "text"|"code"|"formula", text}, {type: "strong"|"em"|"del", spans} or
 *   {type: "link", address, spans}.
 */
export function parseInline(text, links = true) {
  if (text.length > MAX_INLINE) return [{ type: "text", text }];
  const reading = { text, at: 0, spans: [], open: [], links, ticks: null };
  while (reading.at < text.length) {
    SPECIAL.lastIndex = reading.at;
    const found = SPECIAL.exec(text);
    if (found === null) break;
    addText(reading, text.slice(reading.at, found.index));
    reading.at = found.index;
    readSpecial(reading, found[0]);
  }
  addText(reading, text.slice(reading.at));
  return joined(reading.spans);
}

function addText(reading, text) {
  if (text !== "") reading.spans.push({ type: "text", text });
}

/** Read what begins at a special character; whatever it is not, is text. */
function readSpecial(reading, found) {
  const readers = { "\\": readEscape, "`": readCode, "*": readEmphasis, _: readEmphasis, "~": readEmphasis, "[": readLink, "!": readImage, "<": readAngle, $: readDollar };
  const read = readers[found] ?? readBare;
  if (read(reading)) return;
  addText(reading, reading.text[reading.at]);
  reading.at += 1;
}

function readEscape(reading) {
  const next = reading.text[reading.at + 1];
  if (next === "(" || next === "[") {
    const closing = reading.text.indexOf(next === "(" ? "\\)" : "\\]", reading.at + 2);
    if (closing >= 0 && closing - reading.at <= MAX_ADDRESS) return take(reading, closing + 2, "formula");
  }
  if (next === undefined || !PUNCTUATION.test(next)) return false;
  addText(reading, next);
  reading.at += 2;
  return true;
}

function take(reading, end, type, from = reading.at, to = end) {
  reading.spans.push({ type, text: reading.text.slice(from, to) });
  reading.at = end;
  return true;
}

function readCode(reading) {
  reading.ticks ??= runsOfTicks(reading.text);
  const length = lengthOfRun(reading.text, reading.at);
  const places = reading.ticks.get(length) ?? [];
  while (places.length > 0 && places[0] <= reading.at) places.shift();
  if (places.length === 0) {
    addText(reading, "`".repeat(length));
    reading.at += length;
    return true;
  }
  const inside = reading.text.slice(reading.at + length, places[0]).replaceAll("\n", " ");
  const padded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ") && inside.trim() !== "";
  reading.spans.push({ type: "code", text: padded ? inside.slice(1, -1) : inside });
  reading.at = places[0] + length;
  return true;
}

function runsOfTicks(text) {
  const runs = new Map();
  for (const run of text.matchAll(/`+/g)) {
    if (!runs.has(run[0].length)) runs.set(run[0].length, []);
    runs.get(run[0].length).push(run.index);
  }
  return runs;
}

function lengthOfRun(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function readEmphasis(reading) {
  const { text, at } = reading;
  const mark = text[at];
  const length = lengthOfRun(text, at);
  const [before, after] = [text[at - 1] ?? " ", text[at + length] ?? " "];
  let opens = !/\s/.test(after);
  let closes = !/\s/.test(before);
  if (mark === "_") [opens, closes] = [opens && !WORD.test(before), closes && !WORD.test(after)];
  if (mark === "~" && length !== 2) [opens, closes] = [false, false];
  let left = closes ? closeEmphasis(reading, mark, length, opens) : length;
  if (left > 0) {
    reading.spans.push({ type: "text", text: mark.repeat(left) });
    if (opens && reading.open.length < MAX_OPEN) reading.open.push({ mark, count: left, both: closes, at: reading.spans.length - 1 });
  }
  reading.at += length;
  return true;
}

/** Wrap what is after fitting marks; returns how many marks of the run are left. */
function closeEmphasis(reading, mark, length, both) {
  let left = length;
  for (let index = reading.open.length - 1; index >= 0 && left > 0; index -= 1) {
    const opener = reading.open[index];
    const sum = opener.count + left;
    if (opener.mark !== mark) continue;
    if (mark !== "~" && (opener.both || both) && sum % 3 === 0 && (opener.count % 3 !== 0 || left % 3 !== 0)) continue;
    reading.open.length = index + 1; // what was opened since then closes nowhere
    while (opener.count > 0 && left > 0) {
      const count = opener.count >= 2 && left >= 2 ? 2 : 1;
      const spans = joined(reading.spans.splice(opener.at + 1));
      reading.spans.push({ type: mark === "~" ? "del" : count === 2 ? "strong" : "em", spans });
      opener.count -= count;
      left -= count;
    }
    reading.spans[opener.at].text = mark.repeat(opener.count);
    if (opener.count === 0) reading.open.pop();
  }
  return left;
}

function readImage(reading) {
  if (reading.text[reading.at + 1] !== "[") return false;
  reading.at += 1;
  if (readLink(reading)) return true; // pictures are not loaded from elsewhere: a link with what they show
  reading.at -= 1;
  return false;
}

function readLink(reading) {
  const { text, at } = reading;
  const close = endOfLabel(text, at);
  if (close < 0 || text[close + 1] !== "(") return false;
  const target = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
    text.slice(close + 1, close + 1 + MAX_ADDRESS),
  );
  if (target === null) return false;
  const address = safeAddress((target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
  if (address === null) return false;
  const spans = parseInline(text.slice(at + 1, close), false);
  if (reading.links) reading.spans.push({ type: "link", address, spans });
  else reading.spans.push(...spans);
  reading.at = close + 1 + target[0].length;
  return true;
}

function endOfLabel(text, at) {
  let depth = 0;
  for (let index = at; index < text.length && index - at <= MAX_LABEL; index += 1) {
    if (text[index] === "\\") index += 1;
    else if (text[index] === "[") depth += 1;
    else if (text[index] === "]" && (depth -= 1) === 0) return index;
  }
  return -1;
}

function readAngle(reading) {
  const rest = reading.text.slice(reading.at, reading.at + MAX_ADDRESS);
  const lineEnd = /^<br *\/?>/i.exec(rest);
  if (lineEnd !== null) {
    addText(reading, "\n");
    reading.at += lineEnd[0].length;
    return true;
  }
  const found = /^<((?:https?:\/\/|mailto:)[^\s<>]*|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/i.exec(rest);
  if (found === null) return false;
  const address = safeAddress(/^(?:https?|mailto):/i.test(found[1]) ? found[1] : `mailto:${found[1]}`);
  return address !== null && addLink(reading, address, found[1], found[0].length);
}

function addLink(reading, address, label, length) {
  const span = { type: "text", text: label };
  reading.spans.push(reading.links ? { type: "link", address, spans: [span] } : span);
  reading.at += length;
  return true;
}

function readDollar(reading) {
  const { text, at } = reading;
  const mark = text.startsWith("$$", at) ? "$$" : "$";
  if (/[\s\d]/.test(text[at + mark.length] ?? " ") && mark === "$") return false; // $5 is money
  const close = text.indexOf(mark, at + mark.length);
  if (close < 0 || close - at > MAX_LABEL || close === at + mark.length) return false;
  if (/\s/.test(text[close - 1]) || /\d/.test(text[close + mark.length] ?? "")) return false;
  return take(reading, close + mark.length, "formula");
}

function readBare(reading) {
  BARE.lastIndex = reading.at;
  let found = /[A-Za-z0-9]/.test(reading.text[reading.at - 1] ?? " ") ? null : BARE.exec(reading.text)?.[0];
  if (!found) return false;
  found = found.slice(0, MAX_ADDRESS).replace(/[.,;:!?*_~]+$/, "");
  while (found.endsWith(")") && found.split(")").length > found.split("(").length) found = found.slice(0, -1).replace(/[.,;:!?*_~]+$/, "");
  const address = safeAddress(found);
  return address !== null && addLink(reading, address, found, found.length);
}

/** Join neighbouring texts, and leave out empty ones. */
function joined(spans) {
  const result = [];
  for (const span of spans) {
    if (span.type === "text" && span.text === "") continue;
    const last = result.at(-1);
    if (span.type === "text" && last?.type === "text") result[result.length - 1] = { type: "text", text: last.text + span.text };
    else result.push(span);
  }
  return result;
}
