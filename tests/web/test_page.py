"""The chat page in a real browser, against a scripted server and under `default-src 'self'`.

Needs the built page (`npm ci && npm run build` in web/) and Chromium (`apt-get install chromium`).
Without Chromium these tests are skipped; CI has it.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator

import pytest
from page_server import ANSWER, CORPUS, DIST, MockServer
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

WAIT = 60_000
"""Milliseconds after which something that should appear is missing; much longer than it takes."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (DIST / "index.html").is_file():
        pytest.fail("the page is not built: run `npm ci && npm run build` in web/")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[MockServer]:
    server = MockServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(locale="en-GB")
    context.set_default_timeout(WAIT)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: MockServer) -> Iterator[Page]:
    """The page, open. Fails the test for any complaint of the browser, as of a breach of the policy."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(server.url)
    expect(page.get_by_label("Model")).to_have_value("smollm2")
    yield page
    # The browser itself reports each answer of 4xx as an error.
    assert [text for text in complaints if "responded with a status of 4" not in text] == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Page) -> Locator:
    return page.get_by_role("article", name="Assistant").last


def complete(page: Page) -> None:
    """Waits until nothing streams."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_an_answer_streams_and_is_measured(page: Page, server: MockServer) -> None:
    server.delay = 0.01
    ask(page, "Hello\nworld")
    expect(answer(page)).to_contain_text("hash table")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    complete(page)
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Hello\nworld"}]
    assert (server.requests[0]["temperature"], "max_tokens" in server.requests[0]) == (0.7, False)
    expect(answer(page).get_by_role("heading", name="Collisions")).to_be_visible()
    expect(answer(page).locator(".hljs-keyword").first).to_have_text("class")
    tokens = -(-len(ANSWER) // 4)
    expect(answer(page)).to_contain_text(re.compile(rf"tok/s · first token .* s · {tokens} tokens"))
    link = answer(page).get_by_role("link")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")


def test_stop_closes_the_connection(page: Page, server: MockServer) -> None:
    ask(page, "#slow")
    expect(answer(page)).to_contain_text("5 6 7")
    page.get_by_role("button", name="Stop").click()
    assert server.disconnected.wait(60)
    expect(answer(page)).to_contain_text("Stopped")
    ask(page, "And now?")
    complete(page)
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]


def test_keys(page: Page, server: MockServer) -> None:
    box = page.get_by_label("Message", exact=True)
    expect(box).to_be_focused()
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert server.requests == []
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    assert server.requests == []
    box.press("Enter")
    complete(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    expect(box).to_have_value("")


@pytest.mark.timeout(180)
def test_hostile_markdown_does_nothing(page: Page, server: MockServer) -> None:
    """No script of a model runs, no request leaves, and nothing but Markdown's own elements appears."""
    page.add_init_script("window.alert = () => { document.title = 'RUN' }; window.stolen = 0")
    page.reload()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    server.delay = 0
    for number in range(len(CORPUS)):
        ask(page, f"#xss {number}")
        expect(page.get_by_role("article", name="Assistant")).to_have_count(number + 1)
        complete(page)
    for button in page.locator(".markdown .copy-code").all():
        button.click()
    foreign = "script, img, svg, math, iframe, object, embed, form, input, style, link, video, [style], [id]"
    assert page.locator(f".markdown :is({foreign})").count() == 0
    assert all(href.startswith(("http://", "https://", "mailto:")) for href in _addresses(page))
    assert {url for url in requests if not url.startswith(server.url)} == set()
    assert page.title() != "RUN"
    page.reload()
    expect(page.get_by_role("button", name="#xss 0", exact=True)).to_be_visible()


def _addresses(page: Page) -> list[str]:
    links = page.locator(".markdown a")
    return links.evaluate_all("links => links.map(link => link.getAttribute('href') ?? '')")


def test_history_survives_a_reload_and_can_be_deleted(page: Page) -> None:
    ask(page, "Remember me")
    complete(page)
    page.reload()
    page.get_by_role("button", name="Remember me", exact=True).click()
    expect(answer(page)).to_contain_text("hash table")
    page.get_by_role("button", name="Delete conversation: Remember me").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Nothing here yet")).to_be_visible()


def test_an_answer_cut_off_by_a_reload_is_kept(page: Page, server: MockServer) -> None:
    ask(page, "#slow")
    expect(answer(page)).to_contain_text("20 21")
    page.reload()
    assert server.disconnected.wait(60)
    page.get_by_role("button", name="#slow", exact=True).click()
    expect(answer(page)).to_contain_text("20 21")


def test_edit_and_regenerate(page: Page, server: MockServer) -> None:
    ask(page, "First")
    complete(page)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("article")).to_have_count(2)
    complete(page)
    assert server.requests[0] == server.requests[1]
    page.get_by_role("article", name="You").hover()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Second")
    page.keyboard.press("Enter")
    complete(page)
    assert server.requests[2]["messages"] == [{"role": "user", "content": "Second"}]
    expect(page.get_by_role("button", name="Second", exact=True)).to_be_visible()


def test_errors_are_shown_with_the_servers_words(page: Page, server: MockServer) -> None:
    ask(page, "#error")
    expect(page.get_by_role("alert")).to_contain_text("3 requests in this minute. Try again in 7 s.")
    ask(page, "#broken")
    expect(answer(page)).to_contain_text("So far so good")
    expect(page.get_by_role("alert").last).to_contain_text("The engine was restarted.")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "#error\n\n#broken"}]
    ask(page, "#cut")
    expect(page.get_by_role("alert").last).to_contain_text("closed before the answer was complete")
    ask(page, "#long")
    page.get_by_role("alert").last.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)


def test_settings_reach_the_server_and_stay(page: Page, server: MockServer) -> None:
    page.get_by_label("Model").select_option("other")
    page.get_by_role("main").get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Longest answer").fill("64")
    page.keyboard.press("Escape")
    # Closing saves, in an event of its own that a reload at the same instant would overtake.
    page.wait_for_function("() => JSON.stringify(localStorage).includes('Be brief.')")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("other")
    ask(page, "#think")
    complete(page)
    request = server.requests[0]
    assert (request["model"], request["max_tokens"]) == ("other", 64)
    assert "temperature" not in request
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answer(page).get_by_text("Reasoning")).to_be_visible()
    expect(answer(page).get_by_text("Let me see.")).to_be_hidden()


def test_api_key(page: Page, server: MockServer) -> None:
    server.api_key = "sk-test"
    page.reload()
    page.get_by_role("button", name="Open settings").click()
    page.get_by_label("API key").fill("sk-test")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_label("Model")).to_have_value("smollm2")
    assert page.evaluate("sessionStorage.getItem('kt.key')") == "sk-test"
    ask(page, "Hello")
    complete(page)
    assert len(server.requests) == 1
    assert "sk-test" not in json.dumps(page.evaluate("({...localStorage})"))


def test_copy_code(page: Page, context: BrowserContext) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Hello")
    complete(page)
    page.get_by_role("button", name="Copy", exact=True).first.click()
    copy = page.locator(".copy-code")
    copy.click()
    expect(copy).to_have_text("Copied")
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.startswith("class HashTable:") and text.endswith("slot.append([key, value])")


def test_chinese(browser: Browser, server: MockServer) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)
    expect(page.get_by_role("heading", name="今天想做点什么")).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.get_by_role("button", name="EN", exact=True).click()
    expect(page.get_by_role("heading", name="What shall we work on?")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="What shall we work on?")).to_be_visible()
    context.close()


def test_narrow_screen(browser: Browser, server: MockServer) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server.url)
    ask(page, "Hello")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Show conversations").click()
    expect(page.get_by_role("navigation").get_by_role("button", name="Hello", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    context.close()
