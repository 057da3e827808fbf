"The files around the book agree with each other."

import configparser
import os
import re
import subprocess

import project_links
import pytest
import yaml
from bs4 import BeautifulSoup
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
    targets = {t for s in steps for t in re.findall(r"\bmake ([\w-]+)", s.get("run", ""))}
    assert targets <= {*re.findall(r"^([\w-]+):", makefile, re.M)}
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert all(job.get("timeout-minutes", 0) <= 60 for job in flow["jobs"].values())


def jobs(name: str) -> dict:
    return yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text("utf-8"))["jobs"]


def runs(steps: list[dict]) -> list[str]:
    return [step["run"] for step in steps if "run" in step]


def place(said: str, commands: list[str]) -> int:
    "Of the only command that says this."
    (found,) = [i for i, command in enumerate(commands) if said in command]
    return found


def test_a_release_has_passed_the_tests_and_has_the_version_of_its_tag():
    flow = jobs("release")
    built, after = runs(flow["build"]["steps"]), runs(flow["site"]["steps"])
    wanted = ["settings.ini", "make test", "make pdf", "python -m build"]
    assert sorted(wanted, key=lambda said: place(said, built)) == wanted
    assert flow["publish"]["needs"] == "build" and flow["site"]["needs"] == "publish"
    wanted = ["publish_colab", "gh release create", "gh workflow run book.yml"]
    assert sorted(wanted, key=lambda said: place(said, after)) == wanted


def test_a_release_has_notebooks_of_its_own():
    version = settings()["version"]
    own = "colab" if version.endswith(".dev0") else f"colab-{version}"
    assert settings()["colab_branch"] == own


GH = """#!/bin/sh
case "$1 $2" in
  "release list") echo "v0.2.0 v0.1.0";;
  "release download") echo "<p>$3" > index.html; tar cz index.html;;
esac
"""


def test_the_site_has_every_release_in_a_folder(tmp_path):
    "The steps of the workflow, with a stand-in for GitHub's own command."
    commands = runs(jobs("book")["book"]["steps"])
    first, last = place("gh release list", commands), place("gh release download", commands)
    assert first < place("make pdf", commands) < place("publish_colab", commands) < last
    site = tmp_path / "_build" / "html"
    site.mkdir(parents=True)
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    known = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_ENV": "env"}
    subprocess.run(["bash", "-ec", commands[first]], cwd=tmp_path, env=known, check=True)
    known |= dict(line.split("=") for line in (tmp_path / "env").read_text().splitlines())
    subprocess.run(["bash", "-ec", commands[last]], cwd=tmp_path, env=known, check=True)
    assert {x.parent.name: x.read_text().strip() for x in site.glob("*/index.html")} == {
        "v0.1.0": "<p>v0.1.0", "v0.2.0": "<p>v0.2.0",
    }  # fmt: skip


def test_the_foot_of_a_page_leads_to_the_other_versions():
    base = "https://example.org/book/"
    assert "version" not in project_links.footer(base, "0.3.0.dev0", [])
    foot = project_links.footer(base, "0.3.0.dev0", ["v0.2.0", "v0.1.0"])
    links = [(a.text, a["href"]) for a in BeautifulSoup(foot, "html.parser").find_all("a")]
    assert links[2:] == [
        ("the newest", base), ("v0.2.0", f"{base}v0.2.0/"), ("v0.1.0", f"{base}v0.1.0/"),
    ]  # fmt: skip
    assert "This is version 0.3.0.dev0" in foot
