import { beforeEach, describe, expect, test, vi } from "vitest";

import {
  type Conversation,
  DEFAULT_SETTINGS,
  loadApiKey,
  loadConversations,
  loadSettings,
  MAX_CONVERSATIONS,
  parseConversation,
  saveApiKey,
  saveConversation,
  saveSettings,
} from "../src/lib/storage";

function conversation(id: number): Conversation {
  return { id: `c${id}`, title: "t", updated: id, messages: [{ role: "user", content: "hello" }] };
}

beforeEach(() => {
  localStorage.clear();
  sessionStorage.clear();
});

describe("conversations", () => {
  test("come back, the newest first", () => {
    saveConversation(conversation(1));
    saveConversation(conversation(2));
    expect(loadConversations()).toEqual([conversation(2), conversation(1)]);
  });

  test("are bounded in number: the oldest goes", () => {
    for (let id = 1; id <= MAX_CONVERSATIONS; id++) expect(saveConversation(conversation(id))).toEqual([]);
    expect(saveConversation(conversation(MAX_CONVERSATIONS + 1))).toEqual(["c1"]);
    expect(loadConversations().length).toBe(MAX_CONVERSATIONS);
    expect(saveConversation(conversation(50))).toEqual([]);
  });

  test("make room when the browser's quota is used up", () => {
    for (let id = 1; id <= 3; id++) saveConversation(conversation(id));
    const store = vi.spyOn(Storage.prototype, "setItem");
    store.mockImplementationOnce(() => {
      throw new DOMException("full", "QuotaExceededError");
    });
    expect(saveConversation(conversation(4))).toEqual(["c1"]);
    store.mockImplementation(() => {
      throw new DOMException("full", "QuotaExceededError");
    });
    expect(saveConversation(conversation(5))).toBeNull();
    store.mockRestore();
  });

  test.each([
    null,
    "",
    "{",
    "1",
    "null",
    "[]",
    '{"id":"a"}',
    '{"id":"a","title":"t","updated":1,"messages":[{}]}',
  ])("%j is none", (text) => expect(parseConversation(text)).toBeNull());
});

describe("settings and key", () => {
  test("come back; damage is replaced by defaults", () => {
    const settings = { ...DEFAULT_SETTINGS, system: "Be brief.", temperature: 0.5 };
    saveSettings(settings);
    expect(loadSettings()).toEqual(settings);
    saveSettings({ ...settings, temperature: null });
    expect(loadSettings().temperature).toBeNull();
    localStorage.setItem("kt.settings", '{"temperature":"hot","system":5}');
    expect(loadSettings()).toEqual(DEFAULT_SETTINGS);
  });

  test("the key stays in the tab unless it is to be remembered", () => {
    saveApiKey("k", false);
    expect([loadApiKey(), localStorage.getItem("kt.key")]).toEqual(["k", null]);
    saveApiKey("k", true);
    expect([loadApiKey(), sessionStorage.getItem("kt.key")]).toEqual(["k", null]);
    saveApiKey("", true);
    expect([loadApiKey(), localStorage.getItem("kt.key")]).toEqual(["", null]);
  });
});
