import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import browsers
import pytest
import torch
import yaml
from playwright.sync_api import expect, sync_playwright
from tiny_models import MODELS, SMALL, save_tiny

from po_book.language_model import char_tokenizer, tiny_lm

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build" / "html"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Tests marked `cuda` need a card; `benchmarks/gpu.py` runs them where there is one."
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def toc_pages() -> list[str]:
    "Names of all pages that the table of contents lists."
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [toc["root"], *chapters]


@pytest.fixture(scope="session")
def site() -> Path:
    assert SITE.is_dir(), "the book is not built: run `make book`"
    return SITE


@pytest.fixture(scope="session")
def chromium() -> str:
    found = browsers.find()
    if found is None and os.environ.get("CI"):
        pytest.fail(f"CI needs a browser, one of {browsers.NAMES}")
    return found or pytest.skip(f"no browser: none of {browsers.NAMES} is installed")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def translate_path(self, path):
        "Page 404 names its styles from where the site will stand."
        return super().translate_path(path.removeprefix("/po_book"))


@pytest.fixture(scope="module")
def url(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        expect.set_options(timeout=browsers.PATIENCE)
        browser = playwright.chromium.launch(executable_path=chromium, args=browsers.FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, url):
    "Open a page; everything it complained about and asked for is collected."
    contexts = []

    def open_page(name: str, mode: str, **options):
        options = {"viewport": {"width": 1300, "height": 900}} | options
        context = browser.new_context(color_scheme=mode, **options)
        context.set_default_timeout(browsers.PATIENCE)
        contexts.append(context)
        tab = context.new_page()
        errors, elsewhere = [], []
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: None if r.url.startswith((url, "data:")) else elsewhere.append(r.url))
        tab.goto(f"{url}/{name}.html", wait_until="networkidle")
        # A script of the theme turns "auto" into the mode that the browser asks for.
        tab.wait_for_function("mode => document.documentElement.dataset.theme === mode", arg=mode)
        return tab, errors, elsewhere

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer):
    "A tiny language model."
    return tiny_lm(tokenizer, **SMALL)


@pytest.fixture(scope="module", params=["llama", *MODELS])
def saved(request, tmp_path_factory):
    "Folder of a tiny language model, of each kind in turn."
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    return folder


@pytest.fixture
def double():
    "Numbers are float64, unless a test says otherwise."
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
