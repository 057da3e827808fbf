"""Chapters are numbered by their file names: `46_grpo` is chapter 46 wherever it is listed.

Page title, sidebar and previous/next show the number; equations, figures, theorems and
exercises count within it; "chapter 46" in prose becomes a link to its page.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.transforms.post_transforms import SphinxPostTransform

NUMBERED = re.compile(r"(\d\d[a-z]?)_")

# Code, math, links, comments, headings and directives are passed over.
MENTION = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)"
    r"|(?P<tick>`+).*?(?P=tick)|\$\$.*?\$\$|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|<!--.*?-->"
    r"|^(?:#|:).*?$"
    r"|\b(?P<word>[Cc]hapters?)(?P<list>\s+\d\d[a-z]?\b(?:(?:,|,? and|,? or| to)\s+\d\d[a-z]?\b)*)"
    r"(?!\.\d| of (?:\{cite|\[))",
    re.MULTILINE | re.DOTALL,
)
CITED = re.compile(
    r"(?:\{cite[^`]*`[^`]*`|\b(?:19|20)\d\d\b)[^.;()]{0,12}$"  # `sutton2018`, chapter 13
    r"|\([^()]*\{cite[^()]*$"  # (`sutton2018`, section 2 of chapter 13
)


def number_of(docname: str) -> str | None:
    found = NUMBERED.match(docname)
    return found and found[1]


def chapter_files(env: BuildEnvironment) -> dict[str, str]:
    "File names of the pages that have a number, by number."
    names = {name: Path(env.doc2path(name)).name for name in env.found_docs}
    return {number: file for name, file in names.items() if (number := number_of(name))}


def link_chapters(text: str, chapters: dict[str, str]) -> str:
    "The Markdown `text` with a link for every chapter of ours that it names."

    def link(found: re.Match) -> str:
        word, numbers = found["word"], found["list"]
        if not word or CITED.search(text[: found.start()]):
            return found[0]
        number = numbers.strip()
        if number in chapters:
            return f"[{word} {number}]({chapters[number]})"

        def one(digits: re.Match) -> str:
            file = chapters.get(digits[0])
            return f"[{digits[0]}]({file})" if file else digits[0]

        return word + re.sub(r"\d\d[a-z]?", one, numbers)

    return MENTION.sub(link, text)


def assign_section_numbers(self: TocTreeCollector, env: BuildEnvironment) -> list[str]:
    """Number each page by its file name; in place of Sphinx's count along the contents.

    Sphinx numbers equations and figures from what stands here. A heading below the title
    is listed with no number, so that it shows none and what it holds counts with the page.
    """
    before, env.toc_secnumbers = env.toc_secnumbers, {}
    for name in env.tocs:
        number = number_of(name)
        if number is None:
            continue
        env.titles[name]["secnumber"] = (number,)
        numbers = env.toc_secnumbers[name] = {}
        for reference in env.tocs[name].findall(nodes.reference):
            anchor = reference["anchorname"]
            numbers[anchor] = None if anchor else (number,)
            reference["secnumber"] = numbers[anchor]
    return [name for name, value in env.toc_secnumbers.items() if value != before.get(name)]


def number_equations(env: BuildEnvironment, code: str) -> str:
    """`code` with the numbers of the equations that its docstrings refer to.

    A label that is nowhere defined stays as it is.
    """
    equations = env.get_domain("math").equations

    def number(found: re.Match) -> str:
        page, _ = equations.get(found[1], (None, None))
        numbers = env.toc_fignumbers.get(page, {}).get("displaymath", {})
        parts = numbers.get(f"equation-{found[1]}")
        return f"({'.'.join(map(str, parts))})" if parts else found[0]

    return re.sub(r"\{eq\}`([^`]+)`", number, code)


class EquationsInCode(SphinxPostTransform):
    "Show the number of an equation that a docstring refers to, as prose does."

    default_priority = 10

    def run(self, **kwargs) -> None:
        for block in self.document.findall(nodes.literal_block):
            if "{eq}`" in (code := block.astext()):
                # Sphinx colours only a block whose source is its text.
                block.rawsource = number_equations(self.env, code)
                block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> dict:
    TocTreeCollector.assign_section_numbers = assign_section_numbers
    app.add_post_transform(EquationsInCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
