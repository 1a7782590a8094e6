/** What the browser keeps: settings, and conversations, each under its own key: two tabs do not undo each other. */

export interface AnswerStats {
  /** Seconds from sending to the first token. */
  firstToken: number | null;
  /** The server's count or, when the answer was cut short, the number of pieces received. */
  tokens: number;
  exact: boolean;
  tokensPerSecond: number | null;
  /** The server's finish_reason; "abort": stopped by the user. */
  finish: string;
}

export interface Message {
  role: "user" | "assistant";
  content: string;
  reasoning?: string;
  stats?: AnswerStats;
  error?: { message: string; status: number; code: string | null; retryAfter: number | null };
}

export interface Conversation {
  id: string;
  title: string;
  /** Milliseconds since 1970. */
  updated: number;
  messages: Message[];
}

export interface Settings {
  model: string;
  system: string;
  /** null: the server's default. */
  temperature: number | null;
  /** null: the server's default. */
  maxTokens: number | null;
  /** Keep the API key beyond this tab. */
  rememberKey: boolean;
}

export const DEFAULT_SETTINGS: Settings = {
  model: "",
  system: "",
  // The protocol's default is 1, at which small models ramble.
  temperature: 0.7,
  maxTokens: null,
  rememberKey: false,
};

export const MAX_CONVERSATIONS = 100;
export const CONVERSATION_PREFIX = "kt.conversation.";
const SETTINGS_KEY = "kt.settings";
const API_KEY = "kt.key";

/** All stored conversations, the newest first. What is not one (damaged, of another version) is skipped. */
export function loadConversations(): Conversation[] {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(CONVERSATION_PREFIX))
    .map((key) => parseConversation(localStorage.getItem(key)))
    .filter((conversation) => conversation !== null)
    .sort((a, b) => b.updated - a.updated);
}

/**
 * Stores `conversation`, making room by deleting the oldest others.
 *
 * @returns ids of the conversations that were deleted, or null if it does not fit even alone.
 */
export function saveConversation(conversation: Conversation): string[] | null {
  const text = JSON.stringify(conversation);
  const others = loadConversations().filter(({ id }) => id !== conversation.id);
  const deleted: string[] = [];
  const deleteOldest = (): boolean => {
    const oldest = others.pop();
    if (oldest === undefined) return false;
    deleteConversation(oldest.id);
    deleted.push(oldest.id);
    return true;
  };
  while (others.length >= MAX_CONVERSATIONS) deleteOldest();
  while (!tryStore(CONVERSATION_PREFIX + conversation.id, text)) {
    if (!deleteOldest()) return null;
  }
  return deleted;
}

export function deleteConversation(id: string): void {
  localStorage.removeItem(CONVERSATION_PREFIX + id);
}

export function loadSettings(): Settings {
  const stored = parseObject(localStorage.getItem(SETTINGS_KEY));
  const settings = { ...DEFAULT_SETTINGS };
  if (typeof stored["model"] === "string") settings.model = stored["model"];
  if (typeof stored["system"] === "string") settings.system = stored["system"];
  if (isNumberOrNull(stored["temperature"])) settings.temperature = stored["temperature"];
  if (isNumberOrNull(stored["maxTokens"])) settings.maxTokens = stored["maxTokens"];
  settings.rememberKey = stored["rememberKey"] === true;
  return settings;
}

export function saveSettings(settings: Settings): void {
  tryStore(SETTINGS_KEY, JSON.stringify(settings));
}

export function loadApiKey(): string {
  return sessionStorage.getItem(API_KEY) ?? localStorage.getItem(API_KEY) ?? "";
}

/** Keeps the key for this tab, or with `remember` for this browser; never in both places. */
export function saveApiKey(key: string, remember: boolean): void {
  sessionStorage.removeItem(API_KEY);
  localStorage.removeItem(API_KEY);
  if (key !== "") (remember ? localStorage : sessionStorage).setItem(API_KEY, key);
}

/** The conversation in `text`, or null if it is not one. */
export function parseConversation(text: string | null): Conversation | null {
  const value = parseObject(text);
  const { id, title, updated, messages } = value;
  if (typeof id !== "string" || typeof title !== "string" || typeof updated !== "number") return null;
  if (!Array.isArray(messages) || !messages.every(isMessage)) return null;
  return { id, title, updated, messages };
}

function isMessage(value: unknown): value is Message {
  if (typeof value !== "object" || value === null) return false;
  const { role, content, reasoning, stats, error } = value as Record<string, unknown>;
  return (
    (role === "user" || role === "assistant") &&
    typeof content === "string" &&
    (reasoning === undefined || typeof reasoning === "string") &&
    (stats === undefined || isRecord(stats, { tokens: "number", exact: "boolean", finish: "string" })) &&
    (error === undefined || isRecord(error, { message: "string", status: "number" }))
  );
}

function isNumberOrNull(value: unknown): value is number | null {
  return value === null || typeof value === "number";
}

function isRecord(value: unknown, types: Record<string, "number" | "string" | "boolean">): boolean {
  return (
    typeof value === "object" &&
    value !== null &&
    Object.entries(types).every(([name, type]) => typeof (value as Record<string, unknown>)[name] === type)
  );
}

function parseObject(text: string | null): Record<string, unknown> {
  if (text === null) return {};
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : {};
  } catch {
    // Another program's text under our key: as good as nothing.
    return {};
  }
}

/** False if the browser's quota is used up. */
function tryStore(key: string, text: string): boolean {
  try {
    localStorage.setItem(key, text);
    return true;
  } catch (error) {
    if (error instanceof DOMException) return false;
    throw error;
  }
}
