import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import MODELS, SMALL, save_tiny

from po_book.language_model import char_tokenizer, tiny_lm

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "_ext"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Tests marked `cuda` need a card; `benchmarks/gpu.py` runs them where there is one."
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def toc_pages() -> list[str]:
    "Names of all pages that the table of contents lists."
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [c for part in toc["parts"] for c in part["chapters"]]
    below = [c for chapter in chapters for c in [chapter, *chapter.get("sections", [])]]
    return [toc["root"], *(c["file"] for c in below)]


@pytest.fixture(scope="session")
def site() -> Path:
    assert SITE.is_dir(), "the book is not built: run `make book`"
    return SITE


@pytest.fixture(scope="session")
def chromium() -> str:
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"CI needs a browser, one of {names}")
    return found or pytest.skip(f"no browser: none of {names} is installed")


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
