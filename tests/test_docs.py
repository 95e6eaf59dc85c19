"""The files, headings, functions and commands that the documents refer to exist, and their formulas are balanced."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from urllib.parse import urlparse

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHORT = [f"docs/{name}.md" for name in ("errors", "evaluation", "hub", "training")]  # few links or no commands
DOCUMENTS = ["README.md", "REPORT.md", "samples/README.md", *SHORT]
NOTEBOOK = "docs/from_noise_to_faces.ipynb"
LINK = re.compile(r"!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$`(.+?)`\$", re.DOTALL)


def text_of(name: str) -> str:
    """The text of a document; of a notebook, its Markdown cells."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(text: str) -> str:
    """The text without code blocks and formulas."""
    return FORMULA.sub("", FENCE.sub("", text))


def links(name: str) -> list[tuple[str, str]]:
    """The (text, target) pairs of all links and images of a document."""
    text = prose(text_of(name))
    found = [(match["text"], match["target"]) for match in LINK.finditer(text)]
    return found + [("", target) for target in re.findall(r'<img src="([^"]+)"', text)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", [*DOCUMENTS, NOTEBOOK])
def test_links_resolve(name):
    found = links(name)
    assert len(found) > 5 or name in SHORT
    for text, target in found:
        address = urlparse(target)
        if address.scheme:
            assert address.scheme == "https", target
            continue
        path = (REPOSITORY / name).parent / address.path if address.path else REPOSITORY / name
        assert path.exists(), f"[{text}]({target})"
        assert REPOSITORY in path.resolve().parents, target
        if address.fragment:
            assert address.fragment in anchors(path.read_text()), f"[{text}]({target})"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_functions_exist(name):
    """[`function`](file.py) and [`Class.method`](file.py)."""
    for text, target in links(name):
        match = re.fullmatch(r"`([\w.]+)`", text)
        if match and target.endswith(".py") and not match[1].endswith(".py"):
            path = (REPOSITORY / name).parent / target
            module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            nodes = ast.walk(ast.parse(path.read_text()))
            defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assert {*match[1].split(".")} <= defined | {*module.split(".")}, f"[{text}]({target})"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_and_python_blocks_parse(name):
    text = (REPOSITORY / name).read_text()
    modules = set(re.findall(r"python (?:-W \w+ )?-m ([\w.]+)", text)) | set(re.findall(r"`(eval\.\w+)", text))
    assert modules or name in SHORT
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    rules = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", text)) <= rules
    for path in re.findall(r"\bconfigs/[\w/]+\.yaml", text):
        assert (REPOSITORY / path).is_file(), path
    for language, code in FENCE.findall(text):
        if language == "python":
            ast.parse(code)


@pytest.mark.parametrize("name", [*DOCUMENTS, NOTEBOOK])
def test_formulas_are_balanced(name):
    """Braces and `\\left` match, and GitHub takes every formula for a formula and no line of it for Markdown."""
    text = text_of(name)
    outside = prose(text)
    assert outside.count("$`") == outside.count("`$") == 0
    assert text.count("\n```") % 2 == 0
    formulas = FORMULA.findall(text) + [code for language, code in FENCE.findall(text) if language == "math"]
    if name == NOTEBOOK:  # Jupyter delimits formulas with dollars only
        assert outside.count("$") % 2 == 0
        formulas = re.split(r"\$\$?", outside)[1::2]
    for formula in formulas:
        opening, closing = (len(re.findall(rf"(?<!\\){brace}", formula)) for brace in "{}")
        assert opening == closing, formula
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula)), formula
        assert "`" not in formula, formula
    assert not any("\n\n" in formula for formula in FORMULA.findall(text))
