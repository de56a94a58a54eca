// What Markdown is read as. Run by tests/serving/test_page_modules.py, or: node --test tests/serving/page/

import assert from "node:assert/strict";
import { test } from "node:test";
import { parseBlocks } from "../../../megatron_7b/serving/page/blocks.js";
import { parseInline, safeAddress } from "../../../megatron_7b/serving/page/spans.js";

function written(spans) {
  const one = (span) => {
    if (span.type === "text") return span.text;
    if (span.type === "link") return `<${span.address}|${written(span.spans)}>`;
    return `${span.type}(${span.spans ? written(span.spans) : span.text})`;
  };
  return spans.map(one).join("");
}

function outline(blocks) {
  return blocks.map((block) => {
    if (block.type === "list") return [block.ordered ? block.first : "-", ...block.items.map((item) => outline(item.blocks))];
    if (block.type === "quote") return [">", ...outline(block.blocks)];
    if (block.type === "table") return ["|", block.header, ...block.rows];
    return block.type === "paragraph" ? block.text : `${block.type}:${block.text ?? ""}`;
  });
}

const SPANS = {
  "a **b** *c* ***d*** ~~e~~ `f*g*`": "a strong(b) em(c) em(strong(d)) del(e) code(f*g*)",
  "**中文：**后文，_强调_。": "strong(中文：)后文，em(强调)。",
  "snake_case_name, 2 * 3 * 4, **open": "snake_case_name, 2 * 3 * 4, **open",
  "**a *b* c** *a **b** c* **a*b**": "strong(a em(b) c) em(a strong(b) c) strong(a*b)",
  "`` a`b `` and `open": "code(a`b) and `open",
  "\\*no\\* \\_no\\_": "*no* _no_",
  "[text](https://a.b/c_(d) \"title\")": "<https://a.b/c_(d)|text>",
  "see https://a.b/c). 见https://a.b/d。好": "see <https://a.b/c|https://a.b/c>). 见<https://a.b/d|https://a.b/d>。好",
  "<me@x.org> ![picture](https://a.b/c.png)": "<mailto:me@x.org|me@x.org> <https://a.b/c.png|picture>",
  "$5 and $6, $x^2_3$, \\(a_b*c*\\)": "$5 and $6, formula($x^2_3$), formula(\\(a_b*c*\\))",
  "<script>alert(1)</script> a<br>b": "<script>alert(1)</script> a\nb",
  "[x](javascript:alert(1)) [y](data:text/html,z) [z](//evil.example)": "[x](javascript:alert(1)) [y](data:text/html,z) [z](//evil.example)",
};

for (const [text, expected] of Object.entries(SPANS)) {
  test(`spans: ${text}`, () => assert.equal(written(parseInline(text)), expected));
}

const BLOCKS = [
  ["# One #\ntwo\nthree\n\nfour", ["heading:One", "two\nthree", "four"]],
  ["text\n- a\n  - b\n- c\n\n3. x\n4. y", ["text", ["-", ["a", ["-", ["b"]]], ["c"]], [3, ["x"], ["y"]]]],
  ["1. a\n   ```js\n   x\n   ```\n2. b", [[1, ["a", "code:x"], ["b"]]]],
  ["1. a\n  - b", [[1, ["a", ["-", ["b"]]]]]],
  ["```py\n# no heading\n\n- no item", ["code:# no heading\n\n- no item"]],
  ["````\n```\n````\nafter", ["code:```", "after"]],
  ["> a\n> - b\n\nc", [[">", "a", ["-", ["b"]]], "c"]],
  ["| a | b |\n|---|:-:|\n| 1 | x\\|y |\n| 2 |", [["|", ["a", "b"], ["1", "x|y"], ["2", ""]]]],
  ["a | b\nno table", ["a | b\nno table"]],
  ["In 2026. It began\n2026. was\n---", ["In 2026. It began\n2026. was", "rule:"]],
  ["$$\nx_1\n$$\nafter", ["formula:$$\nx_1\n$$", "after"]],
  ["a\r\n\r\nb\r\n", ["a", "b"]],
];

for (const [text, expected] of BLOCKS) {
  test(`blocks: ${JSON.stringify(text)}`, () => assert.deepEqual(outline(parseBlocks(text)), expected));
}

test("addresses that are linked to", () => {
  for (const good of ["https://a.b/", "http://a.b/c?d=e#f", "mailto:a@b.org"]) assert.equal(safeAddress(good), good);
  const bad = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\nscript:alert(1)", " https://a.b", "data:text/html,x", "vbscript:x", "//a.b", "/a", "a.html", "file:///etc/passwd", "blob:https://a.b/x", "https://", "https://a.b/\u202egnp", "https:\\\\a.b"];
  for (const one of bad) assert.equal(safeAddress(one), null, one);
});

test("time is linear in the length of hostile texts", () => {
  const hostile = {
    ticks: "`a``b```c".repeat(2_000), brackets: "[".repeat(19_999), links: "[a](".repeat(4_999), stars: "**a*".repeat(4_900),
    quotes: ">".repeat(100_000), items: `${"- ".repeat(9_000)}x`, dollars: "$a".repeat(9_999), spaces: `-${" ".repeat(19_000)}x`,
    tables: "|a\n|-".repeat(50_000), columns: `${"|a".repeat(5_000)}\n${"|-".repeat(5_000)}\n`, fences: "```\n".repeat(100_000),
    stairs: Array.from({ length: 1_000 }, (_, index) => `${" ".repeat(index * 2)}- x`).join("\n"),
    line: "word ".repeat(200_000), hashes: `# ${"#".repeat(19_000)}x`,
  };
  for (const [name, text] of Object.entries(hostile)) {
    const started = performance.now();
    const walk = (blocks) => blocks.forEach((block) => {
      if (block.text !== undefined && block.type !== "code") parseInline(block.text);
      if (block.blocks !== undefined) walk(block.blocks);
      block.items?.forEach((item) => walk(item.blocks));
    });
    walk(parseBlocks(text));
    assert.ok(performance.now() - started < 2_000, `${name}: ${performance.now() - started} ms`);
  }
});

test("nesting ends somewhere", () => {
  const depth = (blocks) => 1 + Math.max(0, ...blocks.map((block) => depth(block.blocks ?? block.items?.flatMap((item) => item.blocks) ?? [])));
  assert.ok(depth(parseBlocks(`${">".repeat(5_000)}x`)) < 20);
  assert.ok(depth(parseBlocks(`${"- ".repeat(5_000)}x`)) < 20);
  const spans = (list) => 1 + Math.max(0, ...list.map((span) => spans(span.spans ?? [])));
  assert.ok(spans(parseInline("*a **b ".repeat(1_000) + "b** a*".repeat(1_000))) < 70);
});
