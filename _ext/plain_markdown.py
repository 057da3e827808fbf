"""A page as plain Markdown, made of what Sphinx has resolved: no directive, no role.

What only a directive can say becomes what every reader of Markdown shows: boxes are
quotations that begin with their title, solutions fold, formulas carry their number.
"""

import re
from collections.abc import Callable, Iterable

from docutils import nodes

# Between the signs of a formula, a bar would end the cell of a table.
BARS = {r"\|": r"\Vert ", "|": r"\vert "}
IN_CELL = re.compile(r"(\$[^$]*\$)|\|")


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table_cell(text: str) -> str:
    def replace(found: re.Match) -> str:
        return re.sub(r"\\?\|", lambda bar: BARS[bar[0]], found[1]) if found[1] else r"\|"

    return IN_CELL.sub(replace, text.replace("\n\n", "<br>").replace("\n", " "))


class PlainMarkdown:
    "Writes the nodes of one page; the methods are named like the classes of the nodes."

    def __init__(self, numbers: dict, picture: Callable[[str], str]):
        self.numbers = numbers  # of the page, by kind and id
        self.picture = picture  # from the path of a picture to its address
        self.level = 0

    def write(self, node: nodes.Node) -> str:
        "By the method of its class, or of the nearest base that has one."
        names = [kind.__name__ for kind in type(node).__mro__]
        return next(getattr(self, name) for name in names if hasattr(self, name))(node)

    def inline(self, node: nodes.Element) -> str:
        return "".join(map(self.write, node))

    def blocks(self, parts: Iterable[nodes.Node]) -> str:
        return "\n\n".join(filter(None, map(self.write, parts)))

    def number(self, kind: str, node: nodes.Element) -> str:
        found = (self.numbers.get(kind, {}).get(name) for name in node["ids"])
        return ".".join(map(str, next(filter(None, found), ())))

    # Within a line

    def Text(self, node: nodes.Text) -> str:
        return re.sub(r"[\\*_`$<]", r"\\\g<0>", node.astext().replace("\n", " "))

    def emphasis(self, node: nodes.Element) -> str:
        return f"*{self.inline(node)}*"

    def strong(self, node: nodes.Element) -> str:
        return f"**{self.inline(node)}**"

    def literal(self, node: nodes.Element) -> str:
        text = node.astext()
        return f"`` {text} ``" if "`" in text else f"`{text}`"

    def math(self, node: nodes.Element) -> str:
        return f"${' '.join(node.astext().split())}$"

    def reference(self, node: nodes.Element) -> str:
        uri = node.get("refuri") or f"#{node['refid']}"
        return f"[{self.inline(node)}]({uri})"

    def image(self, node: nodes.Element) -> str:
        return f"![{node.get('alt', '')}]({self.picture(node['uri'])})"

    TextElement = inline

    # Blocks

    def Element(self, node: nodes.Element) -> str:
        return self.blocks(node)

    def Invisible(self, node: nodes.Element) -> str:
        return ""

    def raw(self, node: nodes.Element) -> str:
        text = node.astext()
        return "" if text.startswith("<!--") else text

    def title(self, node: nodes.Element) -> str:
        return f"{'#' * self.level} {self.inline(node)}"

    def section(self, node: nodes.Element) -> str:
        self.level += 1
        text = self.blocks(node)
        self.level -= 1
        return text

    def math_block(self, node: nodes.Element) -> str:
        number = self.number("displaymath", node)
        tag = rf" \tag{{{number}}}" if number else ""
        # In one line: in a quotation, further lines would begin with its mark.
        return f"$${' '.join(node.astext().split())}{tag}$$"

    def literal_block(self, node: nodes.Element) -> str:
        return fenced(node.astext().rstrip(), node.get("language", ""))

    def block_quote(self, node: nodes.Element) -> str:
        return quote(self.blocks(node))

    def items(self, node: nodes.Element, marks: list[str]) -> str:
        texts = [
            mark + self.blocks(item).replace("\n", "\n" + " " * len(mark))
            for mark, item in zip(marks, node.children, strict=True)
        ]
        return "\n".join(texts)

    def bullet_list(self, node: nodes.Element) -> str:
        return self.items(node, ["- "] * len(node))

    def enumerated_list(self, node: nodes.Element) -> str:
        first = node.get("start", 1)
        return self.items(node, [f"{first + i}. " for i in range(len(node))])

    def table(self, node: nodes.Element) -> str:
        rows = [[table_cell(self.blocks(entry)) for entry in row] for row in node.findall(nodes.row)]
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def caption(self, node: nodes.Element) -> str:
        return f"**Fig. {self.number('figure', node.parent)}.** {self.inline(node)}"

    def called(self, node: nodes.Element) -> str:
        "What a box is called: its kind, its number, its title."
        kind = node.get("realtype", node.get("type", ""))
        number = self.number(node.get("countertype", kind), node)
        return " ".join(filter(None, [kind.title(), number, self.inline(node[0]).strip()]))

    def Admonition(self, node: nodes.Element) -> str:
        if not isinstance(node[0], nodes.title):
            return quote(self.blocks(node))
        return quote(f"**{self.called(node)}**\n\n{self.blocks(node[1:])}")

    def folded(self, node: nodes.Element) -> str:
        title, text = node[0].astext(), self.blocks(node[1:])
        return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"

    def solution_node(self, node: nodes.Element) -> str:
        return self.folded(node)

    def container(self, node: nodes.Element) -> str:
        part = node.get("design_component")
        if part == "card-title":
            return f"**{self.inline(node)}**"
        return self.folded(node) if part == "dropdown" else self.blocks(node)
