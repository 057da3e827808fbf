"""The icons that the pages show, in a font of a few kilobytes.

The theme draws its icons twice: with a script that holds all of Font Awesome, and with
fonts that hold it too, together 800 KB gzipped. `layout.html` leaves the script out, and
here the fonts are cut to the icons in use. As their licence (SIL OFL 1.1) asks of a changed
version, the cut ones have a name of their own; `po_book.css` names them.
"""

import re
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx

FONTS = {"solid": "fa-solid-900", "brands": "fa-brands-400"}
NAME = "po_book icons"
LICENCE = "SIL Open Font License, version 1.1; made from Font Awesome 6 Free"
# Rules such as `.fa-home:before,.fa-house:before{content:"\f015"}`.
RULE = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
VARIABLE = re.compile(r'--pst-icon-[\w-]+:"(.)"')


def used(static: Path) -> set[int]:
    "Code points of the icons that the theme's styles or any page can show."
    css = (static / "styles/pydata-sphinx-theme.css").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in static.parent.rglob("*.html"))
    names = set(re.findall(r"\bfa-[\w-]+", pages))
    rules = [({*re.findall(r"fa-[\w-]+", rule)}, int(sign, 16)) for rule, sign in RULE.findall(css)]
    signs = {sign for its_names, sign in rules if names & its_names}
    return signs | {ord(sign) for sign in VARIABLE.findall(css)}


def cut(font: TTFont, icons: set[int]) -> TTFont:
    "The font with these icons only, renamed."
    options = subset.Options(layout_features=[], name_IDs=[0])
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=icons)
    cutter.subset(font)
    for number, text in {1: NAME, 4: NAME, 6: "po_book-icons", 13: LICENCE}.items():
        font["name"].setName(text, number, 3, 1, 0x409)
    font.flavor = "woff"
    return font


def write_icons(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    icons = used(static)
    (static / "icons").mkdir(exist_ok=True)
    for name, file in FONTS.items():
        font = TTFont(static / f"vendor/fontawesome/webfonts/{file}.ttf")
        cut(font, icons).save(static / f"icons/{name}.woff")


def setup(app: Sphinx) -> dict:
    app.connect("build-finished", write_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
