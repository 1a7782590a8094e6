/** Syntax colours for the languages that answers mostly use; others are shown plain. */

import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";

const languages = {
  bash,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, language] of Object.entries(languages)) hljs.registerLanguage(name, language);

/** Longest source that is coloured, in characters: a block that streams is coloured again and again. */
const MAX_SOURCE = 20_000;

/** HTML of `source` (escaped, with classes only), or null: the language is unknown or the source too long. */
export function highlight(source: string, language: string): string | null {
  if (source.length > MAX_SOURCE || hljs.getLanguage(language) === undefined) return null;
  return hljs.highlight(source, { language, ignoreIllegals: true }).value;
}
