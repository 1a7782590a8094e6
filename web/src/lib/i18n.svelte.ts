/** The page's texts in English and Chinese. */

export type Locale = "en" | "zh";

const en = {
  newChat: "New chat",
  conversations: "Conversations",
  openConversations: "Show conversations",
  closeConversations: "Hide conversations",
  noConversations: "Nothing here yet. Conversations stay in this browser.",
  untitled: "Untitled",
  deleteConversation: "Delete conversation",
  confirmDelete: "Delete this conversation?",
  deleteAll: "Delete all conversations",
  confirmDeleteAll: "Delete all conversations from this browser?",
  settings: "Settings",
  close: "Close",
  model: "Model",
  noModels: "No model",
  language: "Language",
  greeting: "What shall we work on?",
  greetingNote: "Answers come from {model}, running on this server.",
  suggestion1: "Explain how a hash table works, with a small example in Python.",
  suggestion2: "Write a polite email that moves a meeting to next Tuesday.",
  suggestion3: "Compare TCP and UDP in a short table.",
  suggestion4: "Give me five names for a small bakery and say why each fits.",
  message: "Message",
  placeholder: "Write a message",
  send: "Send",
  stop: "Stop",
  hint: "Enter sends, Shift + Enter starts a new line",
  you: "You",
  assistant: "Assistant",
  thinking: "Reasoning",
  waiting: "Waiting for the first token",
  copy: "Copy",
  copied: "Copied",
  copyFailed: "Could not copy",
  edit: "Edit",
  editMessage: "Edit message",
  resend: "Send again",
  cancel: "Cancel",
  regenerate: "Regenerate",
  firstToken: "first token",
  seconds: "{n} s",
  tokensPerSecond: "{n} tok/s",
  tokens: "{n} tokens",
  stopped: "Stopped",
  lengthReached: "Stopped at the token limit",
  answering: "Answering",
  answered: "The answer is complete",
  latest: "Go to the latest message",
  systemPrompt: "System prompt",
  systemPromptHint: "Sent before every conversation.",
  temperature: "Temperature",
  temperatureHint: "0 is the most predictable, 2 the most varied. Empty: the server's default.",
  maxTokens: "Longest answer (tokens)",
  maxTokensHint: "Empty: the server's default.",
  serverDefault: "Default",
  apiKey: "API key",
  apiKeyHint: "Needed only if the server asks for one. Sent to this server and to nobody else.",
  rememberKey: "Remember the key in this browser",
  rememberKeyHint: "Otherwise it is forgotten when this tab closes.",
  show: "Show",
  hide: "Hide",
  errorTitle: "No answer",
  unreachable: "The server cannot be reached. Is it running?",
  incomplete: "The connection closed before the answer was complete.",
  needKey: "The server asks for an API key.",
  openSettings: "Open settings",
  retryAfter: "Try again in {n} s.",
  loadingModels: "Waiting for the server",
  storageFull: "This browser's storage is full: the conversation is not saved.",
};

const zh: Record<keyof typeof en, string> = {
  newChat: "新对话",
  conversations: "对话",
  openConversations: "显示对话列表",
  closeConversations: "隐藏对话列表",
  noConversations: "还没有对话。对话只保存在本浏览器中。",
  untitled: "未命名",
  deleteConversation: "删除对话",
  confirmDelete: "确定删除这个对话吗？",
  deleteAll: "删除全部对话",
  confirmDeleteAll: "确定从本浏览器中删除全部对话吗？",
  settings: "设置",
  close: "关闭",
  model: "模型",
  noModels: "没有可用模型",
  language: "语言",
  greeting: "今天想做点什么？",
  greetingNote: "回答由运行在本服务器上的 {model} 生成。",
  suggestion1: "解释哈希表的工作原理，并给出一个简短的 Python 示例。",
  suggestion2: "写一封礼貌的邮件，把会议改到下周二。",
  suggestion3: "用一个简短的表格比较 TCP 和 UDP。",
  suggestion4: "给一家小面包店起五个名字，并说明理由。",
  message: "消息",
  placeholder: "输入消息",
  send: "发送",
  stop: "停止",
  hint: "Enter 发送，Shift + Enter 换行",
  you: "你",
  assistant: "助手",
  thinking: "思考过程",
  waiting: "等待首个 token",
  copy: "复制",
  copied: "已复制",
  copyFailed: "复制失败",
  edit: "编辑",
  editMessage: "编辑消息",
  resend: "重新发送",
  cancel: "取消",
  regenerate: "重新生成",
  firstToken: "首个 token",
  seconds: "{n} 秒",
  tokensPerSecond: "{n} token/秒",
  tokens: "{n} 个 token",
  stopped: "已停止",
  lengthReached: "已达到长度上限",
  answering: "正在回答",
  answered: "回答完毕",
  latest: "跳到最新消息",
  systemPrompt: "系统提示词",
  systemPromptHint: "在每个对话之前发送。",
  temperature: "温度",
  temperatureHint: "0 最稳定，2 最多样。留空则使用服务器默认值。",
  maxTokens: "回答最大长度（token）",
  maxTokensHint: "留空则使用服务器默认值。",
  serverDefault: "默认",
  apiKey: "API 密钥",
  apiKeyHint: "仅在服务器要求时需要。只会发送给本服务器。",
  rememberKey: "在本浏览器中记住密钥",
  rememberKeyHint: "否则关闭标签页后即被清除。",
  show: "显示",
  hide: "隐藏",
  errorTitle: "没有得到回答",
  unreachable: "无法连接服务器。它在运行吗？",
  incomplete: "连接在回答完成之前中断。",
  needKey: "服务器要求提供 API 密钥。",
  openSettings: "打开设置",
  retryAfter: "请在 {n} 秒后重试。",
  loadingModels: "正在等待服务器",
  storageFull: "浏览器存储空间已满：对话未能保存。",
};

export type TextKey = keyof typeof en;

const TEXTS: Record<Locale, Record<TextKey, string>> = { en, zh };
const STORAGE_KEY = "kt.locale";

function initialLocale(): Locale {
  const chosen = localStorage.getItem(STORAGE_KEY);
  if (chosen === "en" || chosen === "zh") return chosen;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

class I18n {
  locale: Locale = $state(initialLocale());

  choose(locale: Locale): void {
    this.locale = locale;
    localStorage.setItem(STORAGE_KEY, locale);
  }
}

export const i18n = new I18n();

/** The text named `key` in the chosen language, its `{name}`s filled in. */
export function t(key: TextKey, values: Record<string, string | number> = {}): string {
  let text = TEXTS[i18n.locale][key];
  for (const [name, value] of Object.entries(values))
    text = text.replaceAll(`{${name}}`, () => String(value));
  return text;
}
