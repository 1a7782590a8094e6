"""The chat page's files, by route; never by path."""

import gzip

import pytest
from fastapi import FastAPI

from ktransformers.server import app as app_module

PAGE = {
    "index.html": b"<!doctype html><div id=app></div>",
    "assets/a-123.js": b"let a = 1;" * 100,
    "icon.svg": b"<svg/>",
}
HTML = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture
def app(make, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(app_module, "page_files", lambda: PAGE)
    return make(keys=("some-key-123",))


@pytest.mark.anyio
async def test_browsers_get_the_page_and_clients_the_words(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        page = await client.get("/", headers=HTML)
        assert page.content == PAGE["index.html"] and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert (
            "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            assert (await client.get("/", headers=headers)).text == "Ollama is running"
        assert (await client.head("/")).status_code == 200


@pytest.mark.anyio
async def test_files(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        for path, media in (("assets/a-123.js", "javascript"), ("icon.svg", "svg")):
            plain = await client.get(f"/{path}", headers={"Accept-Encoding": "identity"})
            assert plain.content == PAGE[path] and media in plain.headers["content-type"]
            packed = await client.get(f"/{path}", headers={"Accept-Encoding": "gzip"})
            assert packed.content == PAGE[path] and packed.headers["content-encoding"] == "gzip"
            assert int(packed.headers["content-length"]) == len(gzip.compress(PAGE[path], mtime=0))
        assert "immutable" in (await client.get("/assets/a-123.js")).headers["cache-control"]
        assert (await client.get("/", headers=HTML)).headers["cache-control"] == "no-cache"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        *("/index.html", "/assets/", "/assets/../icon.svg", "/assets/%2e%2e/icon.svg", "/assets/x"),
        *("/dist/index.html", "/etc/passwd", "/assets/a-123.js/"),
    ],
)
async def test_nothing_else(app: FastAPI, connect, path: str) -> None:
    async with connect(app) as client:
        answer = await client.get(path)
        assert answer.status_code == 404 or (
            path.startswith("/assets/..") and answer.content == PAGE["icon.svg"]
        )
