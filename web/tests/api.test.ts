import { afterEach, describe, expect, test, vi } from "vitest";

import { ApiError, type ChatEvent, listModels, parseEvents, readChunk, streamChat } from "../src/lib/api";

const REQUEST = { model: "m", messages: [], temperature: null, maxTokens: null };

/** A stream of the bytes of `text` in pieces of `size`. */
function bytes(text: string, size: number): ReadableStream<Uint8Array> {
  const all = new TextEncoder().encode(text);
  let at = 0;
  return new ReadableStream({
    pull(controller) {
      if (at >= all.length) controller.close();
      else controller.enqueue(all.slice(at, (at += size)));
    },
  });
}

async function collect<T>(items: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const item of items) all.push(item);
  return all;
}

function respond(body: BodyInit | null, init: ResponseInit = {}): void {
  vi.stubGlobal(
    "fetch",
    vi.fn(async () => new Response(body, init)),
  );
}

afterEach(() => vi.unstubAllGlobals());

describe("parseEvents", () => {
  test.each(["\n", "\r\n", "\r"])("ends lines with %j, wherever the bytes are cut", async (end) => {
    const text = [
      "data: héllo 世界 🙂",
      "",
      ": comment",
      "event: x",
      "data:a",
      "data: b",
      "",
      "data",
      "",
      "",
    ].join(end);
    for (let size = 1; size <= text.length * 2; size++) {
      expect(await collect(parseEvents(bytes(text, size)))).toEqual(["héllo 世界 🙂", "a\nb", ""]);
    }
  });

  test("drops an event that the stream breaks off", async () => {
    expect(await collect(parseEvents(bytes("data: a\n\ndata: b\n", 4)))).toEqual(["a"]);
  });

  test("skips a byte order mark and keeps all but one space", async () => {
    expect(await collect(parseEvents(bytes("\ufeffdata:  a \n\n", 3)))).toEqual([" a "]);
  });

  test("takes time in proportion to the length of a line", async () => {
    const text = `data: ${"x".repeat(500_000)}\n\n`;
    const events = await collect(parseEvents(bytes(text, 64)));
    expect(events[0]?.length).toBe(500_000);
  });

  test("refuses an endless line", async () => {
    await expect(collect(parseEvents(bytes("x".repeat(3 << 20), 1 << 16)))).rejects.toThrow("too long");
  });

  test("refuses an endless event", async () => {
    const line = `data: ${"x".repeat(1000)}\n`;
    await expect(collect(parseEvents(bytes(line.repeat(3000), 1 << 16)))).rejects.toThrow("too long");
  });

  test("cancels the stream when the reader leaves", async () => {
    const cancel = vi.fn();
    const stream = new ReadableStream<Uint8Array>({
      start: (controller) => controller.enqueue(new TextEncoder().encode("data: a\n\n")),
      cancel,
    });
    for await (const _ of parseEvents(stream)) break;
    expect(cancel).toHaveBeenCalledOnce();
  });
});

describe("readChunk", () => {
  const read = (chunk: unknown): ChatEvent[] => [...readChunk(JSON.stringify(chunk))];

  test("reads text, both names of reasoning, the reason of the end and the usage", () => {
    expect(read({ choices: [{ delta: { role: "assistant", content: "" }, finish_reason: null }] })).toEqual(
      [],
    );
    expect(read({ choices: [{ delta: { content: "a" } }] })).toEqual([{ kind: "text", text: "a" }]);
    expect(read({ choices: [{ delta: { reasoning: "r" } }] })).toEqual([{ kind: "reasoning", text: "r" }]);
    expect(read({ choices: [{ delta: { reasoning_content: "r" } }] })).toEqual([
      { kind: "reasoning", text: "r" },
    ]);
    expect(read({ choices: [{ delta: {}, finish_reason: "stop" }] })).toEqual([
      { kind: "finish", reason: "stop" },
    ]);
    expect(read({ choices: [], usage: { prompt_tokens: 3, completion_tokens: 5 } })).toEqual([
      { kind: "usage", usage: { promptTokens: 3, completionTokens: 5 } },
    ]);
  });

  test.each([
    null,
    [],
    "x",
    1,
    {},
    { choices: null },
    { choices: [null] },
    { choices: [{ delta: { content: 1 } }] },
  ])("finds nothing in %j", (chunk) => expect(read(chunk)).toEqual([]));

  test("throws the server's error", () => {
    const error = { error: { message: "engine restarted", type: "server_error", code: "engine_restarted" } };
    expect(() => read(error)).toThrow(new ApiError("engine restarted", 200, "engine_restarted"));
    expect(() => [...readChunk("{")]).toThrow("not JSON");
  });
});

describe("streamChat", () => {
  const chunk = (text: string): string =>
    `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`;
  const signal = new AbortController().signal;

  test("sends what was set, and no more", async () => {
    respond(`${chunk("a")}data: [DONE]\n\n`);
    const request = { ...REQUEST, messages: [{ role: "user" as const, content: "hi" }], maxTokens: 5 };
    expect(await collect(streamChat(request, "k", signal))).toEqual([{ kind: "text", text: "a" }]);
    const [path, init] = vi.mocked(fetch).mock.calls[0] ?? [];
    expect(path).toBe("/v1/chat/completions");
    expect(JSON.parse(String(init?.body))).toEqual({
      model: "m",
      messages: [{ role: "user", content: "hi" }],
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: 5,
    });
    expect(new Headers(init?.headers).get("Authorization")).toBe("Bearer k");
    expect(init?.credentials).toBe("omit");
  });

  test("says so when the stream ends too early", async () => {
    respond(chunk("a"));
    await expect(collect(streamChat(REQUEST, "", signal))).rejects.toMatchObject({
      code: "incomplete",
      status: 0,
    });
  });

  test("says so when the connection breaks", async () => {
    respond(new ReadableStream({ pull: (controller) => controller.error(new TypeError("network")) }));
    await expect(collect(streamChat(REQUEST, "", signal))).rejects.toMatchObject({
      code: "incomplete",
      status: 0,
    });
  });

  test("hands on the server's message, status, code and Retry-After", async () => {
    const error = {
      message: "too many requests",
      type: "rate_limit_error",
      param: null,
      code: "rate_limit_exceeded",
    };
    respond(JSON.stringify({ error }), { status: 429, headers: { "Retry-After": "7" } });
    const expected = {
      message: "too many requests",
      status: 429,
      code: "rate_limit_exceeded",
      retryAfter: 7,
    };
    await expect(collect(streamChat(REQUEST, "", signal))).rejects.toMatchObject(expected);
  });

  test("copes with an error page that is not JSON", async () => {
    respond("<html>bad gateway</html>", { status: 502 });
    await expect(collect(streamChat(REQUEST, "", signal))).rejects.toMatchObject({
      message: "HTTP 502",
      status: 502,
    });
  });

  test("an abort is an abort, not an error of the server", async () => {
    const controller = new AbortController();
    vi.stubGlobal(
      "fetch",
      vi.fn(async () => {
        controller.abort();
        throw new TypeError("Failed to fetch");
      }),
    );
    await expect(collect(streamChat(REQUEST, "", controller.signal))).rejects.toMatchObject({
      name: "AbortError",
    });
  });
});

describe("listModels", () => {
  test("lists the names", async () => {
    respond(JSON.stringify({ object: "list", data: [{ id: "a" }, { id: 1 }, null, { id: "b" }] }));
    expect(await listModels("")).toEqual(["a", "b"]);
  });

  test("throws when nobody answers", async () => {
    vi.stubGlobal(
      "fetch",
      vi.fn(async () => Promise.reject(new TypeError("Failed to fetch"))),
    );
    await expect(listModels("")).rejects.toMatchObject({ status: 0, code: "unreachable" });
  });
});
