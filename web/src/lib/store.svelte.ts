/** The page's state, and the one place where answers are asked for and arrive. */

import { ApiError, type ChatMessage, type ChatRequest, listModels, streamChat } from "./api";
import {
  CONVERSATION_PREFIX,
  type Conversation,
  deleteConversation,
  loadApiKey,
  loadConversations,
  loadSettings,
  type Message,
  parseConversation,
  saveApiKey,
  saveConversation,
  saveSettings,
  type Settings,
} from "./storage";

/** Milliseconds between two redraws of a streaming answer: tokens may come faster than is worth drawing. */
const REDRAW = 50;
/** Milliseconds between two attempts to reach a server that is still loading its model. */
const RETRY = 3000;
const TITLE_LENGTH = 60;

class Store {
  conversations: Conversation[] = $state(loadConversations());
  /** Id of the conversation on the page; null: a new one that has no message yet. */
  currentId: string | null = $state(null);
  settings: Settings = $state(loadSettings());
  apiKey: string = $state(loadApiKey());
  models: string[] = $state([]);
  modelsError: ApiError | null = $state(null);
  storageFull = $state(false);
  /** The conversations that are being answered, and how to stop each. */
  #running: Record<string, AbortController> = $state({});
  #retry: ReturnType<typeof setTimeout> | undefined;

  get current(): Conversation | null {
    return this.conversations.find(({ id }) => id === this.currentId) ?? null;
  }

  isRunning(id: string | null): boolean {
    return id !== null && id in this.#running;
  }

  /** Asks the server for its models, again and again while it starts. */
  async refreshModels(): Promise<void> {
    clearTimeout(this.#retry);
    try {
      this.models = await listModels(this.apiKey);
      this.modelsError = null;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.models = [];
      this.modelsError = error;
      if (error.status === 0 || error.status === 503) {
        this.#retry = setTimeout(() => void this.refreshModels(), RETRY);
      }
      return;
    }
    if (!this.models.includes(this.settings.model)) this.settings.model = this.models[0] ?? "";
  }

  saveSettings(): void {
    saveSettings($state.snapshot(this.settings));
    saveApiKey(this.apiKey, this.settings.rememberKey);
  }

  /** Adds a message of the user to the conversation (a new one if there is none) and asks for the answer. */
  async send(content: string): Promise<void> {
    const conversation = this.current ?? this.#create(content);
    if (this.isRunning(conversation.id)) return;
    conversation.messages.push({ role: "user", content });
    await this.#answer(conversation);
  }

  /** Replaces the user's message at `index`, drops what came after it and asks again. */
  async resend(index: number, content: string): Promise<void> {
    const conversation = this.current;
    if (conversation === null || this.isRunning(conversation.id)) return;
    conversation.messages.splice(index, Infinity, { role: "user", content });
    if (index === 0) conversation.title = titleOf(content);
    await this.#answer(conversation);
  }

  /** Drops the answer at `index` and what came after it and asks again. */
  async regenerate(index: number): Promise<void> {
    const conversation = this.current;
    if (conversation === null || this.isRunning(conversation.id)) return;
    conversation.messages.splice(index, Infinity);
    await this.#answer(conversation);
  }

  /** Closes the connection of the answer that streams: the server stops computing it. */
  stop(id: string): void {
    this.#running[id]?.abort();
  }

  delete(id: string): void {
    this.stop(id);
    deleteConversation(id);
    this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
    if (this.currentId === id) this.currentId = null;
  }

  deleteAll(): void {
    for (const { id } of this.conversations) this.delete(id);
  }

  /** Stores every conversation whose answer is still streaming: the page is going away. */
  saveRunning(): void {
    for (const conversation of this.conversations)
      if (this.isRunning(conversation.id)) this.#save(conversation);
  }

  /** Takes over what another tab stored or deleted (`key`: of local storage). */
  adopt(key: string, text: string | null): void {
    if (!key.startsWith(CONVERSATION_PREFIX)) return;
    const id = key.slice(CONVERSATION_PREFIX.length);
    if (this.isRunning(id)) return;
    const others = this.conversations.filter((conversation) => conversation.id !== id);
    const stored = parseConversation(text);
    this.conversations = stored === null ? others : [stored, ...others].sort((a, b) => b.updated - a.updated);
  }

  #create(content: string): Conversation {
    const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) =>
      byte.toString(16).padStart(2, "0"),
    );
    this.conversations.unshift({
      id: id.join(""),
      title: titleOf(content),
      updated: Date.now(),
      messages: [],
    });
    const conversation = this.conversations[0];
    if (conversation === undefined) throw new Error("unreachable: a conversation was just added");
    this.currentId = conversation.id;
    return conversation;
  }

  #save(conversation: Conversation): void {
    const deleted = saveConversation($state.snapshot(conversation));
    this.storageFull = deleted === null;
    if (deleted !== null && deleted.length > 0) {
      this.conversations = this.conversations.filter(({ id }) => !deleted.includes(id));
    }
  }

  async #answer(conversation: Conversation): Promise<void> {
    const controller = new AbortController();
    const request = this.#request(conversation);
    conversation.updated = Date.now();
    this.conversations.sort((a, b) => b.updated - a.updated);
    conversation.messages.push({ role: "assistant", content: "" });
    // The message as the page sees it: through the state's proxy.
    const answer = conversation.messages.at(-1);
    if (answer === undefined) throw new Error("unreachable: an answer was just added");
    this.#running[conversation.id] = controller;
    this.#save(conversation);
    try {
      await receive(request, this.apiKey, controller.signal, answer);
    } finally {
      delete this.#running[conversation.id];
      // Deleted meanwhile: it must not come back.
      if (this.conversations.some(({ id }) => id === conversation.id)) this.#save(conversation);
    }
  }

  #request(conversation: Conversation): ChatRequest {
    const { model, system, temperature, maxTokens } = this.settings;
    const messages: ChatMessage[] = system.trim() === "" ? [] : [{ role: "system", content: system }];
    for (const { role, content } of conversation.messages) {
      // A failed answer may say nothing, and many chat templates insist that the two take turns.
      if (content === "") continue;
      const last = messages.at(-1);
      if (last?.role === role) last.content += `\n\n${content}`;
      else messages.push({ role, content });
    }
    return { model, messages, temperature, maxTokens };
  }
}

/** Streams the answer to `request` into `answer` and measures it. The server's errors end up in `answer.error`. */
async function receive(
  request: ChatRequest,
  apiKey: string,
  signal: AbortSignal,
  answer: Message,
): Promise<void> {
  const sent = performance.now();
  let first: number | null = null;
  let last = sent;
  let pieces = 0;
  let completionTokens: number | null = null;
  let finish = "";
  let content = "";
  let reasoning = "";
  let timer: ReturnType<typeof setTimeout> | undefined;
  const draw = (): void => {
    timer = undefined;
    answer.content = content;
    if (reasoning !== "") answer.reasoning = reasoning;
  };
  try {
    for await (const event of streamChat(request, apiKey, signal)) {
      if (event.kind === "text" || event.kind === "reasoning") {
        if (event.kind === "text") content += event.text;
        else reasoning += event.text;
        last = performance.now();
        first ??= last;
        pieces++;
        timer ??= setTimeout(draw, REDRAW);
      } else if (event.kind === "finish") {
        finish = event.reason;
      } else {
        completionTokens = event.usage.completionTokens;
      }
    }
  } catch (error) {
    if (signal.aborted) {
      finish = "abort";
    } else if (error instanceof ApiError) {
      const { message, status, code, retryAfter } = error;
      answer.error = { message, status, code, retryAfter };
    } else {
      throw error;
    }
  } finally {
    clearTimeout(timer);
    draw();
    const tokens = completionTokens ?? pieces;
    const span = first === null ? 0 : (last - first) / 1000;
    answer.stats = {
      firstToken: first === null ? null : (first - sent) / 1000,
      tokens,
      exact: completionTokens !== null,
      tokensPerSecond: tokens > 1 && span > 0 ? (tokens - 1) / span : null,
      finish,
    };
  }
}

/** A title from the first words of the first message. */
function titleOf(content: string): string {
  const line = content.trim().split("\n", 1)[0] ?? "";
  const letters = Array.from(line);
  return letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH).join("").trimEnd()}…` : line;
}

export const store = new Store();
