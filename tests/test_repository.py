"The files around the book agree with each other."

import configparser
import re

import pytest
import yaml

from conftest import ROOT

GITHUB = ROOT / ".github"


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


@pytest.mark.parametrize("name", ["README.md", "nbs/index.ipynb"])
def test_what_is_installed_from_is_this_repository(name):
    ours = f"https://github.com/{settings()['user']}/{settings()['repo']}"
    found = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / name).read_text("utf-8"))
    assert {*found} == {ours}


def test_whoever_cites_cites_this_project():
    cited, ours = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8")), settings()
    assert cited["title"] == ours["title"] and cited["abstract"] == ours["description"]
    assert cited["version"] == ours["version"]
    assert cited["repository-code"] == f"https://github.com/{ours['user']}/{ours['repo']}"
    assert cited["url"] == f"https://{ours['user']}.github.io/{ours['repo']}"
    assert {"cff-version", "message", "authors"} <= cited.keys()


@pytest.mark.parametrize(
    "path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_a_form_asks_what_is_needed(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "description", "labels", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize(
    "path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_a_workflow_calls_what_the_makefile_has_and_ends(path):
    flow = yaml.safe_load(path.read_text("utf-8"))
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {t for s in steps for t in re.findall(r"\bmake (\w+)", s.get("run", ""))}
    assert targets <= {*re.findall(r"^(\w+):", makefile, re.M)}
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert all(job.get("timeout-minutes", 0) <= 60 for job in flow["jobs"].values())


def test_a_release_has_passed_the_tests_and_has_the_version_of_its_tag():
    flow = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text("utf-8"))
    runs = [step.get("run", "") for step in flow["jobs"]["build"]["steps"]]
    check = next(i for i, run in enumerate(runs) if "settings.ini" in run)
    assert check < runs.index("make test") < next(i for i, r in enumerate(runs) if "build" in r)
    assert flow["jobs"]["publish"]["needs"] == "build"
    assert f"version = {settings()['version']}" in (ROOT / "settings.ini").read_text("utf-8")
