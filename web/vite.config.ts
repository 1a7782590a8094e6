import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// KT_SERVER: where `npm run dev` forwards the API; the built page is served by the server itself.
const server = process.env["KT_SERVER"] ?? "http://127.0.0.1:8000";

export default defineConfig({
  plugins: [svelte()],
  // Relative, so that the page works under any path behind a proxy.
  base: "./",
  build: {
    target: "es2022",
    // The content security policy is default-src 'self': no data: URLs, no inline polyfill.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  server: { proxy: { "/v1": server } },
  test: { environment: "jsdom", include: ["tests/**/*.test.ts"] },
});
