/** The server's OpenAI-style API as this page uses it: the list of models, and one streamed chat answer. */

export interface ChatMessage {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface ChatRequest {
  model: string;
  messages: ChatMessage[];
  /** null: the server's default. */
  temperature: number | null;
  /** Most tokens of the answer; null: the server's default. */
  maxTokens: number | null;
}

export interface Usage {
  promptTokens: number;
  completionTokens: number;
}

/** One thing that a streamed answer says. */
export type ChatEvent =
  | { kind: "text"; text: string }
  | { kind: "reasoning"; text: string }
  | { kind: "finish"; reason: string }
  | { kind: "usage"; usage: Usage };

/** Why there is no answer. `status` 0: nobody answered; `status` 200: the error came inside the stream. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string | null = null,
    /** Seconds after which the server asks to try again. */
    readonly retryAfter: number | null = null,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = "ApiError";
  }
}

/** Longest event that is buffered, in characters: a stream without line ends must not fill the memory. */
const MAX_EVENT = 1 << 20;

/**
 * The `data` of each server-sent event of a byte stream, by the rules of the HTML standard (section 9.2.6): lines
 * end with CR LF, LF or CR; several `data` lines of one event are joined by LF; comments and other fields are
 * skipped; an event that the stream breaks off is dropped.
 *
 * Leaving the loop early cancels the stream.
 */
export async function* parseEvents(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let scanned = 0;
  let data: string[] = [];
  let size = 0;
  let ended = false;
  try {
    while (!ended) {
      const { done, value } = await reader.read();
      ended = done;
      buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let start = 0;
      for (let end = lineEnd(buffer, scanned, ended); end >= 0; end = lineEnd(buffer, start, ended)) {
        const line = buffer.slice(start, end);
        start = end + (buffer.startsWith("\r\n", end) ? 2 : 1);
        if (line === "") {
          if (data.length > 0) yield data.join("\n");
          data = [];
          size = 0;
        } else if (line === "data" || line.startsWith("data:")) {
          const text = line.slice(line.startsWith("data: ") ? 6 : 5);
          data.push(text);
          size += text.length;
        }
      }
      buffer = buffer.slice(start);
      // A CR at the very end may be half of a CR LF: it is looked at again.
      scanned = Math.max(0, buffer.length - 1);
      if (buffer.length + size > MAX_EVENT)
        throw new ApiError("The server sent an event that is too long.", 200);
    }
  } finally {
    // Cancelling a stream that has ended or failed changes nothing; its rejection repeats the read's.
    await reader.cancel().catch(() => undefined);
  }
}

/** Index of the next line end at or after `from`, or -1. A CR in the last place counts only once `ended`. */
function lineEnd(buffer: string, from: number, ended: boolean): number {
  for (let at = from; at < buffer.length; at++) {
    const unit = buffer.charCodeAt(at);
    if (unit === 10 || (unit === 13 && (at + 1 < buffer.length || ended))) return at;
  }
  return -1;
}

/**
 * Streams one answer. Aborting `signal` closes the connection, which cancels the request on the server, and throws
 * the signal's `AbortError`.
 *
 * @throws {ApiError} with the server's message, or when the stream ends before it said that it was done.
 */
export async function* streamChat(
  request: ChatRequest,
  apiKey: string,
  signal: AbortSignal,
): AsyncGenerator<ChatEvent> {
  const body: Record<string, unknown> = {
    model: request.model,
    messages: request.messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (request.temperature !== null) body["temperature"] = request.temperature;
  if (request.maxTokens !== null) body["max_tokens"] = request.maxTokens;
  const response = await send("/v1/chat/completions", apiKey, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (response.body === null) throw new ApiError("The server sent an empty answer.", response.status);
  let broken: unknown;
  try {
    for await (const data of parseEvents(response.body)) {
      if (data === "[DONE]") return;
      yield* readChunk(data);
    }
  } catch (cause) {
    if (cause instanceof ApiError) throw cause;
    broken = cause;
  }
  signal.throwIfAborted();
  throw new ApiError("The connection closed before the answer was complete.", 0, "incomplete", null, {
    cause: broken,
  });
}

/** What one `chat.completion.chunk` says. @throws {ApiError} if it is an error, or not JSON. */
export function* readChunk(data: string): Generator<ChatEvent> {
  let chunk: unknown;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent an event that is not JSON.", 200);
  }
  const error = field(chunk, "error");
  if (error !== undefined && error !== null) throw errorFrom(chunk, 200, null);
  const choices = field(chunk, "choices");
  if (Array.isArray(choices) && choices.length > 0) {
    const delta = field(choices[0], "delta");
    // Two names for the same thing: servers disagree.
    const reasoning = field(delta, "reasoning_content") ?? field(delta, "reasoning");
    if (typeof reasoning === "string" && reasoning !== "") yield { kind: "reasoning", text: reasoning };
    const text = field(delta, "content");
    if (typeof text === "string" && text !== "") yield { kind: "text", text };
    const reason = field(choices[0], "finish_reason");
    if (typeof reason === "string") yield { kind: "finish", reason };
  }
  const usage = field(chunk, "usage");
  const promptTokens = field(usage, "prompt_tokens");
  const completionTokens = field(usage, "completion_tokens");
  if (typeof promptTokens === "number" && typeof completionTokens === "number") {
    yield { kind: "usage", usage: { promptTokens, completionTokens } };
  }
}

/** Names of the models that the key may use. @throws {ApiError} */
export async function listModels(apiKey: string): Promise<string[]> {
  const response = await send("/v1/models", apiKey, {});
  const data = field(await response.json().catch(() => null), "data");
  if (!Array.isArray(data))
    throw new ApiError("The server sent a list of models that is not one.", response.status);
  return data.map((model) => field(model, "id")).filter((id) => typeof id === "string");
}

async function send(path: string, apiKey: string, init: RequestInit): Promise<Response> {
  const headers = new Headers(init.headers);
  if (apiKey !== "") headers.set("Authorization", `Bearer ${apiKey}`);
  let response: Response;
  try {
    // The page knows no cookies: a key is sent only when the user gave one.
    response = await fetch(path, {
      ...init,
      headers,
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
    });
  } catch (cause) {
    init.signal?.throwIfAborted();
    throw new ApiError("The server cannot be reached.", 0, "unreachable", null, { cause });
  }
  if (!response.ok) {
    const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
    throw errorFrom(
      await response.json().catch(() => null),
      response.status,
      Number.isFinite(seconds) ? seconds : null,
    );
  }
  return response;
}

function errorFrom(body: unknown, status: number, retryAfter: number | null): ApiError {
  const error = field(body, "error");
  const message = typeof error === "string" ? error : field(error, "message");
  const code = field(error, "code");
  return new ApiError(
    typeof message === "string" && message !== "" ? message : `HTTP ${status}`,
    status,
    typeof code === "string" ? code : null,
    retryAfter,
  );
}

function field(value: unknown, name: string): unknown {
  return typeof value === "object" && value !== null ? (value as Record<string, unknown>)[name] : undefined;
}
