import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";

import { markdownRenderer, safeAddress } from "../src/lib/markdown";

/** Shared with tests/web/test_page.py, where a real browser renders it. */
const corpus = JSON.parse(readFileSync("../tests/web/xss_corpus.json", "utf-8")) as string[];

const TAGS = new Set(
  "P BR HR H1 H2 H3 H4 H5 H6 STRONG EM DEL CODE PRE BLOCKQUOTE UL OL LI A TABLE THEAD TBODY TR TH TD SPAN DIV BUTTON".split(
    " ",
  ),
);
const ATTRIBUTES = new Set(["href", "title", "class", "tabindex", "start", "align", "type", "target", "rel"]);

function dom(source: string): HTMLElement {
  const element = document.createElement("div");
  element.innerHTML = markdownRenderer("Copy")(source).join("");
  return element;
}

describe("untrusted Markdown", () => {
  test.each(corpus)("%j", (source) => {
    for (const element of dom(source).querySelectorAll("*")) {
      expect(TAGS).toContain(element.tagName);
      for (const { name, value } of element.attributes) {
        expect(ATTRIBUTES).toContain(name);
        if (name === "href") expect(value).toMatch(/^(https?:\/\/|mailto:)/);
      }
      if (element.tagName === "A") {
        expect(element.getAttribute("rel")).toBe("noopener noreferrer");
        expect(element.getAttribute("target")).toBe("_blank");
      }
      if (element.tagName === "BUTTON") expect(element.parentElement?.className).toBe("code-head");
    }
  });

  test("shows HTML as text", () => {
    expect(dom("a <b>b</b> <script>x</script>").textContent?.trim()).toBe("a <b>b</b> <script>x</script>");
    expect(dom("<div>\n<img src=x>\n</div>").textContent).toContain("<img src=x>");
  });

  test.each([
    ["https://a.invalid/b?c=d#e", "https://a.invalid/b?c=d#e"],
    ["mailto:a@b.invalid", "mailto:a@b.invalid"],
    ["javascript:alert(1)", null],
    ["\tjava\nscript:alert(1)", null],
    ["/v1/models", null],
    ["//a.invalid", null],
    ["", null],
  ])("address %j", (href, expected) => expect(safeAddress(href)).toBe(expected));

  test.each(["*", "[", "`", "> ", "- ", "_a", "![", "<a ", "| ", "**a", "~~"])(
    "takes no quadratic time over %j",
    (piece) => {
      const render = markdownRenderer("Copy");
      const before = performance.now();
      render(piece.repeat(2000));
      expect(performance.now() - before).toBeLessThan(2000);
    },
  );
});

describe("Markdown", () => {
  test("links open elsewhere; images become links to themselves", () => {
    const link = dom("[text](https://a.invalid)").querySelector("a");
    expect(link?.outerHTML).toBe(
      '<a href="https://a.invalid/" target="_blank" rel="noopener noreferrer">text</a>',
    );
    expect(dom("![a cat](https://a.invalid/cat.png)").querySelector("a")?.textContent).toBe("a cat");
    expect(dom("![a cat](https://a.invalid/cat.png)").querySelector("img")).toBeNull();
  });

  test("colours code of a known language and copies it whole", () => {
    const element = dom("```python\nif a < b:\n    print('&amp;')\n```");
    expect(element.querySelector(".hljs-keyword")?.textContent).toBe("if");
    expect(element.querySelector("pre code")?.textContent).toBe("if a < b:\n    print('&amp;')");
    expect(element.querySelector(".code-head")?.textContent).toBe("pythonCopy");
  });

  test("shows code of an unknown language, and an unfinished block, plain", () => {
    expect(dom("```brainf\n<+>\n```").querySelector("pre code")?.textContent).toBe("<+>");
    expect(dom("```\nopen").querySelector("pre code")?.textContent).toBe("open");
  });

  test("tables, lists, line breaks", () => {
    expect(dom("| a | b |\n|---|--:|\n| 1 | 2 |").querySelector("td[align=right]")?.textContent).toBe("2");
    expect(dom("3. x\n4. y").querySelector("ol")?.getAttribute("start")).toBe("3");
    expect(dom("a\nb").querySelectorAll("br").length).toBe(1);
    expect(dom("- [x] done").textContent).toContain("☑ done");
  });

  test("renders again what a later reference changes", () => {
    const render = markdownRenderer("Copy");
    expect(render("[x][r]").join("")).not.toContain("<a");
    expect(render("[x][r]\n\n[r]: https://a.invalid").join("")).toContain('href="https://a.invalid/"');
    expect(render("[x][r]").join("")).not.toContain("<a");
  });
});
