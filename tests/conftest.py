import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "_ext"))


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
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"CI needs a browser, one of {names}")
    return found or pytest.skip(f"no browser: none of {names} is installed")
