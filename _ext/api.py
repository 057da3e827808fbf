"""The API reference, written from the source of the library at build time.

Each page of `PARTS` gets an entry for every public name of one part of the book, as objects
of Sphinx's Python domain: so the search finds them, signatures link to each other, and a
name in backticks on any page links to its entry. The page `api` lists all names.
"""

import csv
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from api_source import Argument, Entry, Module, read_library, reached
from chapter_numbers import number_of
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
PARTS = {"api_foundations": "1", "api_trust_regions": "2", "api_control": "3",
         "api_language_models": "4", "api_further": "5", "api_tools": "6"}  # fmt: skip
MAKER = re.compile(r"field\(default_factory=(\w+)\)")
LABELS = re.compile(r"\b(Raises|Source):")
IMPORT = re.compile(r"from (?:po_book)?\.?(\w+) import (\([^)]*\)|[^\n\\]*)")
NAME = re.compile(r"(?:po_book\.)?[A-Za-z_][\w.]*(?:\(\))?")


@cache
def library() -> dict[str, Module]:
    return read_library(ROOT / "po_book")


@cache
def entries() -> dict[str, list[Entry]]:
    "All public names, by the name alone."
    found: dict[str, list[Entry]] = {}
    for module in library().values():
        for name in module.public:
            found.setdefault(name, []).append(module.entry(name))
    return found


@cache
def conventions() -> dict[str, str]:
    "Parameters that mean the same wherever no comment says more."
    with open(Path(__file__).with_name("parameters.csv"), encoding="utf-8") as file:
        return dict(csv.reader(file))


@cache
def in_use() -> set[tuple[str, str]]:
    return reached(library())


def plain(kind: str) -> str:
    "A type that may be missing, without that."
    return kind.removesuffix(" | None")


def meaning(x: Argument, owner: Entry) -> str:
    """What a parameter is: the comment beside it, or what its own type says, or its base
    class, or the convention of the book."""
    if x.meaning:
        return x.meaning
    if plain(x.type) in entries():
        return summary(entries()[plain(x.type)][0])
    return inherited(x.name, owner) or conventions().get(x.name.strip("*"), "")


def inherited(name: str, owner: Entry) -> str:
    "What a base class says of a parameter of its heir, or of the heir's method."
    for base in owner.bases:
        for entry in entries().get(base, []):
            methods = [y for x in entry.members if x.name == owner.name for y in x.arguments]
            found = [meaning(y, entry) for y in methods or entry.arguments if y.name == name]
            if said := found[0] if found else inherited(name, replace(owner, bases=entry.bases)):
                return said
    return ""


def summary(entry: Entry) -> str:
    "A type with the first sentence of its docstring."
    first = re.split(r"[.;:]\s", " ".join(entry.docstring.split()))[0].rstrip(".")
    return f"`{entry.name}`, {first[0].lower()}{first[1:]}" if first else f"`{entry.name}`"


def listed(arguments: list[Argument], owner: Entry) -> list[str]:
    lines = []
    for x in arguments:
        said = meaning(x, owner)
        if not said and owner.kind == "method":
            continue
        if not said:
            logger.warning("nothing says what %s of %s.%s is", x.name, owner.module, owner.name)
        # The type stands in the signature above, or begins what is said of it.
        typed = owner.kind != "class" or owner.signature or said.startswith(f"`{plain(x.type)}`")
        kind = "" if typed else f" `{x.type}`"
        value = MAKER.sub(r"\1()", x.default or "")
        default = f", default `{value}`" if value else ""
        lines.append(f"- **{x.name}**{kind}{default}: {said}")
    return lines


def described(entry: Entry) -> list[str]:
    "The docstring, with what it raises and where it is from set apart."
    return LABELS.sub(r"*\1:*", entry.docstring).splitlines()


def member(entry: Entry, owner: Entry) -> list[str]:
    "A public method or property of a class."
    option = [":no-contents-entry:"]
    signature = f" {entry.signature}"
    if entry.kind == "property":
        option, signature = [*option, f":type: {entry.signature}"], ""
    return [f":::::{{py:{entry.kind}}} {owner.name}.{entry.name}{signature.strip()}",
            f":module: po_book.{entry.module}", *option, "", *described(entry), "",
            *listed(entry.arguments, entry), ":::::", ""]


def written(entry: Entry, cell: str, repository: str) -> list[str]:
    "One entry, as Markdown."
    module = library()[entry.module]
    option = [f":type: {entry.signature}"] if entry.kind == "data" and entry.signature else []
    signature = "" if entry.kind == "data" else entry.signature
    use = "for use" if (entry.module, entry.name) in in_use() else "for study"
    first, last = entry.lines
    code = f"{repository}/po_book/{entry.module}.py#L{first}-L{last}"
    bases = [f"Extends {', '.join(f'`{x}`' for x in entry.bases)}.", ""] if entry.bases else []
    members = [line for x in entry.members for line in member(x, entry)]
    where = f"{{ref}}`chapter {number_of(module.page)} <cell-{cell}>`"
    return [f":::::::{{py:{entry.kind}}} {entry.name}{signature}",
            f":module: po_book.{entry.module}", *option, "", *described(entry), "", *bases,
            *listed(entry.arguments, entry), "",
            ":::{container} po-api-facts", f"{use} · defined in {where} · [source]({code})", ":::", "",
            *members, ":::::::", ""]


def section(module: Module, repository: str) -> list[str]:
    "All public names of one module."
    lines = [f"(api-{module.name})=", f"## {module.name}", "",
             f":::{{py:module}} po_book.{module.name}", ":::", "",
             f"{module.docstring} ([](/{module.page}))", ""]
    for name in module.public:
        lines += written(module.entry(name), module.cell(name), repository)
    return lines


def overview(part: str) -> list[str]:
    "The names of every module of a part, each a link."
    title = part.removeprefix("api_").replace("_", " ").capitalize()
    lines = [f"## {title}", "", f"With all entries: [](/{part}).", ""]
    for module in of_part(part):
        full = f"po_book.{module.name}"
        names = ", ".join(f"{{py:obj}}`{name} <{full}.{name}>`" for name in module.public)
        lines.append(f"- **[{module.name}](#api-{module.name})**: {names}")
    return [*lines, ""]


def of_part(part: str) -> list[Module]:
    return [x for x in library().values() if x.page.startswith(PARTS[part])]


def write_page(app: Sphinx, docname: str, source: list[str]) -> None:
    theme = app.config.html_theme_options
    repository = f"{theme['repository_url']}/blob/{theme['repository_branch']}"
    lines = []
    if docname in PARTS:
        lines = [line for x in of_part(docname) for line in section(x, repository)]
    elif docname == "api":
        lines = [line for part in PARTS for line in overview(part)]
    source[0] += "\n" + "\n".join(lines)


def link(builder, page: str, found: tuple, text: nodes.Node) -> nodes.reference:
    full, entry = found
    return make_refnode(builder, page, entry.docname, entry.node_id, [text], full)


def resolve(domain: PythonDomain, name: str, module: str, imports: dict[str, str]) -> tuple | None:
    """The object that `name` means on a page: of its own module, of one that it imports
    from, or the only one there is, unless the word is a parameter's name too."""
    if not name.startswith("po_book.") and "." in name:
        name = f"po_book.{name}"
    own = [name, f"{module}.{name}", f"po_book.{imports.get(name)}.{name}"]
    for candidate in own:
        if candidate in domain.objects:
            return candidate, domain.objects[candidate]
    if len(found := entries().get(name, [])) != 1 or name in words():
        return None
    full = f"po_book.{found[0].module}.{name}"
    return (full, domain.objects[full]) if full in domain.objects else None


@cache
def words() -> set[str]:
    "Public names that are also what a parameter is called."
    every = [x for found in entries().values() for x in found]
    every += [member for entry in every for member in entry.members]
    return {x.name.strip("*") for entry in every for x in entry.arguments}


def imports_of(module: str) -> dict[str, str]:
    "Which module each name comes from that a module of the library imports."
    known = library().get(module.removeprefix("po_book."))
    return {name: place for name, (place, _) in known.imports.items()} if known else {}


class LinkTypes(SphinxPostTransform):
    "Types in signatures: those of the library link to their entry, others stay text."

    default_priority = 5  # before Sphinx, which warns of types that it does not know

    def run(self, **kwargs) -> None:
        domain = self.env.get_domain("py")
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node["refdomain"] != "py" or not (module := node.get("py:module")):
                continue
            found = resolve(domain, node["reftarget"], module, imports_of(module))
            text = node.children
            shown = [link(self.app.builder, self.env.docname, found, text[0])] if found else text
            node.parent.replace(node, shown)


class LinkNames(SphinxPostTransform):
    "A name of the library in backticks links to its entry."

    default_priority = 20

    def context(self) -> tuple[str, dict[str, str]]:
        "The module of a chapter, and where it imports each name from."
        page = self.env.docname
        module = next((f"po_book.{x.name}" for x in library().values() if x.page == page), "")
        path = Path(self.env.doc2path(page))
        if path.suffix != ".ipynb":
            return module, {}
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "code")
        found = IMPORT.findall(code)
        return module, {name: x for x, names in found for name in re.findall(r"\w+", names)}

    def run(self, **kwargs) -> None:
        module, imports = self.context()
        domain = self.env.get_domain("py")
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext()
            if not NAME.fullmatch(name) or inside(node, nodes.title, nodes.reference):
                continue
            entry = around(node)
            here = entry["module"] if entry else module
            known = imports_of(here) if entry else imports
            found = resolve(domain, name.removesuffix("()"), here, known)
            if found and not (entry and found[0] == f"{here}.{entry['fullname']}"):
                node.replace_self(link(self.app.builder, self.env.docname, found, node.deepcopy()))


def inside(node: nodes.Node, *kinds: type) -> bool:
    "Whether a node of such a kind, or the output of a cell, holds this one."
    while node := node.parent:
        output = isinstance(node, nodes.Element) and node.get("nb_element") == "cell_code"
        if output or isinstance(node, kinds):
            return True
    return False


def around(node: nodes.Node) -> addnodes.desc_signature | None:
    "The signature of the entry that a node stands in."
    while node := node.parent:
        if isinstance(node, addnodes.desc):
            return node[0]
    return None


def setup(app: Sphinx) -> dict:
    # Before the bridge, which links the chapters that a docstring names.
    app.connect("source-read", write_page, priority=400)
    app.add_post_transform(LinkTypes)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
