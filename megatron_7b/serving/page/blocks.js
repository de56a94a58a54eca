// The blocks of Markdown as models write it, as plain data: nothing here knows a document, and nothing makes HTML.
//
// CommonMark and GFM's tables and task lists, with what a chat needs otherwise: line ends are kept, what belongs to an
// item may be indented by two, formulas are left alone, HTML is text. Time is linear in the length of the text.

import { MAX_INLINE } from "./spans.js";

const MAX_DEPTH = 12; // of quotes and lists within one another; what is deeper is shown as text

const FENCE = /^( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const COLUMN = /^:?-+:?$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/;

/**
 * Divide a text into blocks.
 *
 * @param {string} text
 * @returns {Array<Object>} Blocks: {type: "paragraph"|"heading"|"code"|"quote"|"list"|"table"|"rule"|"formula", …}, each
 *   with `start`, the offset in the text at which its first line begins.
 */
export function parseBlocks(text) {
  const lines = text.split("\n");
  const offsets = new Array(lines.length);
  for (let index = 0, offset = 0; index < lines.length; index += 1) {
    offsets[index] = offset;
    offset += lines[index].length + 1;
  }
  const blocks = parseLines(lines.map(withoutTabs), 0);
  for (const block of blocks) block.start = offsets[block.line];
  return blocks;
}

function withoutTabs(line) {
  const ended = line.endsWith("\r") ? line.slice(0, -1) : line;
  return ended.startsWith("\t") || ended.startsWith(" ")
    ? ended.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "))
    : ended;
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = parseBlock(lines, at, depth);
    block.line = at;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  if (line.length <= MAX_INLINE) {
    if (FENCE.test(line)) return parseCode(lines, at);
    if (HEADING.test(line)) return [parseHeading(line), at + 1];
    if (RULE.test(line)) return [{ type: "rule" }, at + 1];
    if (FORMULA.test(line)) return parseFormula(lines, at);
    if (depth < MAX_DEPTH && QUOTE.test(line)) return parseQuote(lines, at, depth);
    if (depth < MAX_DEPTH && ITEM.test(line)) return parseList(lines, at, depth);
    if (isTable(lines, at)) return parseTable(lines, at);
  }
  return parseParagraph(lines, at, depth);
}

function isBlank(line) {
  return line.trim() === "";
}

function interrupts(lines, at, depth) {
  const line = lines[at];
  if (line.length > MAX_INLINE) return false;
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || FORMULA.test(line) || isTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && item[3] !== "" && !/^[02-9]|^1\d/.test(item[2]));
}

function parseParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [{ type: "paragraph", text }, end];
}

function parseHeading(line) {
  const level = HEADING.exec(line)[1].length;
  const text = line.trim().slice(level).trim().replace(/(^|\s)#+$/, "").trim();
  return { type: "heading", level, text };
}

function parseCode(lines, at) {
  const [, indent, ticks, info, tildes, tildeInfo] = FENCE.exec(lines[at]);
  const mark = ticks ?? tildes;
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},} *$`);
  const inside = [];
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) {
    inside.push(withoutIndent(lines[end], indent.length));
    end += 1;
  }
  const open = end === lines.length;
  const language = (info ?? tildeInfo).trim().split(/\s+/, 1)[0].slice(0, 40);
  return [{ type: "code", language, text: inside.join("\n"), open }, open ? end : end + 1];
}

function parseFormula(lines, at) {
  const closing = FORMULA.exec(lines[at])[1] === "$$" ? "$$" : "\\]";
  const isLast = (line, from) => line.indexOf(closing, from) >= 0;
  let end = at;
  while (end < lines.length && !isLast(lines[end], end === at ? lines[at].search(/\S/) + 2 : 0)) end += 1;
  if (end === lines.length) end -= 1; // not closed yet, or never
  return [{ type: "formula", text: lines.slice(at, end + 1).join("\n").trim() }, end + 1];
}

function parseQuote(lines, at, depth) {
  const inside = [];
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) {
    inside.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return [{ type: "quote", blocks: parseLines(inside, depth + 1) }, end];
}

function withoutIndent(line, most) {
  let spaces = 0;
  while (spaces < most && line[spaces] === " ") spaces += 1;
  return line.slice(spaces);
}

function indentOf(line) {
  const found = line.search(/[^ ]/);
  return found < 0 ? line.length : found;
}

function kindOf(marker) {
  return /\d/.test(marker) ? marker.at(-1) : marker;
}

function parseList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const kind = kindOf(first[2]);
  const list = { type: "list", ordered: /\d/.test(first[2]), first: Number.parseInt(first[2], 10) || 0, loose: false, items: [] };
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (item === null || kindOf(item[2]) !== kind || RULE.test(lines[next])) break;
    const [inside, end, blankAfter] = gatherItem(lines, next, item, depth);
    list.items.push(parseItem(inside, depth));
    next = end;
    const another = next < lines.length ? ITEM.exec(lines[next]) : null;
    if (blankAfter && another !== null && kindOf(another[2]) === kind) list.loose = true;
  }
  list.loose ||= list.items.some((item) => item.blocks.filter((block) => block.type === "paragraph").length > 1);
  return [list, next];
}

/** Gather the lines of one item, without their indent; returns them, the line after, and whether blank ones follow. */
function gatherItem(lines, at, item, depth) {
  const width = item[1].length + item[2].length + (item[3].length > 4 || item[3] === "" ? 1 : item[3].length);
  const least = item[1].length + 2; // models indent what belongs to `1.` by two as often as by three
  const inside = [lines[at].slice(Math.min(width, lines[at].length))];
  let end = at + 1;
  let blank = 0;
  while (end < lines.length) {
    const line = lines[end];
    if (isBlank(line)) {
      blank += 1;
    } else if (indentOf(line) >= least) {
      for (; blank > 0; blank -= 1) inside.push("");
      inside.push(withoutIndent(line, width));
    } else if (blank === 0 && !interrupts(lines, end, depth) && !ITEM.test(line)) {
      inside.push(line.trim()); // the paragraph goes on without an indent
    } else {
      break;
    }
    end += 1;
  }
  return [inside, end, blank > 0];
}

function parseItem(inside, depth) {
  const task = /^\[([ xX])\] /.exec(inside[0]);
  if (task !== null) inside[0] = inside[0].slice(4);
  return { checked: task === null ? null : task[1] !== " ", blocks: parseLines(inside, depth + 1) };
}

function isTable(lines, at) {
  const [line, below] = [lines[at], lines[at + 1]];
  if (below === undefined || !line.includes("|") || !below.includes("-") || below.length > MAX_INLINE) return false;
  const columns = cellsOf(below);
  return columns.every((column) => COLUMN.test(column)) && cellsOf(line).length === columns.length;
}

function cellsOf(line) {
  const trimmed = line.trim().replace(/^\|/, "");
  const cells = [];
  let cell = "";
  for (let at = 0; at < trimmed.length; at += 1) {
    if (trimmed[at] === "\\" && trimmed[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (trimmed[at] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else {
      cell += trimmed[at];
    }
  }
  if (cell.trim() !== "" || cells.length === 0) cells.push(cell.trim());
  return cells;
}

function parseTable(lines, at) {
  const header = cellsOf(lines[at]);
  const align = cellsOf(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : left ? "left" : null;
  });
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|") && lines[end].length <= MAX_INLINE) {
    const cells = cellsOf(lines[end]);
    rows.push(header.map((_, column) => cells[column] ?? ""));
    end += 1;
  }
  return [{ type: "table", header, align, rows }, end];
}
