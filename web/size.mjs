// Fails the build when the page outgrows its budget: it is part of every wheel and of every first visit.
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";

const BUDGET = 100 * 1024;
let total = 0;
for (const entry of readdirSync("dist", { recursive: true, withFileTypes: true })) {
  if (!entry.isFile()) continue;
  const path = join(entry.parentPath, entry.name);
  const bytes = gzipSync(readFileSync(path), { level: 9 }).length;
  total += bytes;
  console.log(`${(bytes / 1024).toFixed(1).padStart(7)} KiB gzipped  ${path}`);
}
console.log(`${(total / 1024).toFixed(1).padStart(7)} KiB of ${BUDGET / 1024} KiB`);
if (total > BUDGET) process.exit(1);
