"""A headless Chromium that reaches nothing but this machine, and notes all that goes wrong on a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@contextmanager
def page(width: int = 1420, height: int = 900) -> Iterator[tuple[Page, list[str], list[str]]]:
    """Yields a page, what went wrong on it, and what it asked for."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        try:
            opened = browser.new_page(viewport={"width": width, "height": height})
            wrong: list[str] = []
            asked: list[str] = []
            opened.on("console", lambda message: wrong.append(_said(message)) if message.type == "error" else None)
            opened.on("pageerror", lambda error: wrong.append(str(error)))
            opened.on("requestfailed", lambda request: wrong.append(f"no answer: {request.url}"))
            opened.on("request", lambda request: asked.append(request.url))
            yield opened, wrong, asked
        finally:
            browser.close()


def _said(message: ConsoleMessage) -> str:
    return f"{message.text} ({message.location['url']})"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def files(directory: Path) -> Iterator[str]:
    """Serves a directory and yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory))) as http:
        thread = Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
