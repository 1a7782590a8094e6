/**
 * Markdown of a model, which may have been told to attack the reader, as HTML that is safe to insert.
 *
 * Three fences, each enough alone: raw HTML is shown as text, links go only to http(s) and mailto and images are
 * never loaded (the renderer below); DOMPurify lets through a short list of tags and attributes; and the page is
 * served with a content security policy of `default-src 'self'`.
 */

import DOMPurify, { type Config } from "dompurify";
import { Marked, type Links, type Token, type Tokens } from "marked";

import { highlight } from "./highlight";

const PURIFY: Config = {
  ALLOWED_TAGS: [
    ...[
      "p",
      "br",
      "hr",
      "h1",
      "h2",
      "h3",
      "h4",
      "h5",
      "h6",
      "strong",
      "em",
      "del",
      "code",
      "pre",
      "blockquote",
    ],
    ...["ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td", "span", "div", "button"],
  ],
  ALLOWED_ATTR: ["href", "title", "class", "tabindex", "start", "align", "type", "target", "rel"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  // Their values are no addresses: without this they, too, would have to look like one.
  ADD_URI_SAFE_ATTR: ["target", "rel", "align", "type", "start", "tabindex"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

/** The address if it may be followed, else null. */
export function safeAddress(href: string): string | null {
  let address: URL;
  try {
    // A relative address would be one of this server's own: the model has none to offer.
    address = new URL(href);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
}

export function escapeHtml(text: string): string {
  return text
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;")
    .replaceAll("'", "&#39;");
}

function anchor(href: string, title: string | null | undefined, inner: string): string {
  const address = safeAddress(href);
  if (address === null) return inner;
  const tip = title ? ` title="${escapeHtml(title)}"` : "";
  return `<a href="${escapeHtml(address)}"${tip} target="_blank" rel="noopener noreferrer">${inner}</a>`;
}

/** Blocks that a renderer remembers by their source: while an answer streams, only its last block is new. */
const MAX_REMEMBERED = 2000;

/**
 * A function that turns Markdown into its top-level blocks, each as safe HTML.
 *
 * @param copyLabel text of the button (class `copy-code`) that stands over each block of code.
 */
export function markdownRenderer(copyLabel: string): (source: string) => string[] {
  const marked = createMarked(escapeHtml(copyLabel));
  const remembered = new Map<string, string>();

  function renderBlock(token: Token, links: Links): string {
    // With reference links a block depends on more than its own source.
    const memorable = Object.keys(links).length === 0;
    const known = memorable ? remembered.get(token.raw) : undefined;
    if (known !== undefined) return known;
    const html = DOMPurify.sanitize(marked.parser(Object.assign([token], { links })), PURIFY);
    if (memorable) {
      if (remembered.size >= MAX_REMEMBERED) remembered.clear();
      remembered.set(token.raw, html);
    }
    return html;
  }

  return (source) => {
    try {
      const tokens = marked.lexer(source);
      return tokens
        .filter((token) => token.type !== "space" && token.type !== "def")
        .map((token) => renderBlock(token, tokens.links));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      // Nested deeper than the parser's stack: nothing that anyone would read as Markdown.
      return [`<pre><code>${escapeHtml(source)}</code></pre>`];
    }
  };
}

function createMarked(copyLabel: string): Marked {
  return new Marked({
    gfm: true,
    breaks: true,
    renderer: {
      html: ({ text }) => escapeHtml(text),
      link({ href, title, tokens }) {
        return anchor(href, title, this.parser.parseInline(tokens));
      },
      // A remote image would tell its host who reads what, and when.
      image: ({ href, title, text }) => anchor(href, title, escapeHtml(text || href)),
      code: ({ text, lang }) => codeBlock(text, lang ?? "", copyLabel),
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
      table({ header, rows }) {
        const row = (cells: Tokens.TableCell[]): string =>
          `<tr>${cells.map((cell) => tableCell(cell, this.parser.parseInline(cell.tokens))).join("")}</tr>`;
        const body = rows.map(row).join("");
        return `<div class="table"><table><thead>${row(header)}</thead><tbody>${body}</tbody></table></div>`;
      },
    },
  });
}

/** The source can be focused, because a long line is scrolled with the keyboard's arrows. */
function codeBlock(source: string, info: string, copyLabel: string): string {
  const language = /^[\w+#.-]{1,24}/.exec(info)?.[0] ?? "";
  return (
    `<div class="code"><div class="code-head"><span>${language}</span>` +
    `<button type="button" class="copy-code">${copyLabel}</button></div>` +
    `<pre tabindex="0"><code>${highlight(source, language) ?? escapeHtml(source)}</code></pre></div>`
  );
}

function tableCell(cell: Tokens.TableCell, inner: string): string {
  const tag = cell.header ? "th" : "td";
  return `<${tag}${cell.align ? ` align="${cell.align}"` : ""}>${inner}</${tag}>`;
}
