"""python scripts/source_tree.py

Writes the source tree into docs/architecture.md: every file of intern/, hydra_plugins/ and scripts/ with the first line of its
docstring, packages in the order in which they may import each other (pyproject.toml's layers). With --check it only compares.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "architecture.md"
BEGIN, END = "<!-- source tree: python scripts/source_tree.py -->\n", "<!-- end of the source tree -->\n"
WIDTH = 28  # of a file's name and its indentation
MOST = 90  # characters of a phrase


def phrase(file: Path) -> str:
    """What a file is for: the first sentence of its docstring, or of `main` if that is the command's usage."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    if not text:
        sys.exit(f"{file.relative_to(PROJECT)}: has no docstring: its first sentence says what the file is for")
    paragraphs = [" ".join(one.split()) for one in text.split("\n\n")]
    if re.match(r"python [^:]*$", paragraphs[0]):
        mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        paragraphs = [ast.get_docstring(one) or "" for one in mains if ast.get_docstring(one)] or paragraphs[1:]
    text = " ".join(paragraphs[0].split())
    text = re.sub(r"^python [^:]*: (\w)", lambda found: found[1].upper(), text)
    return shorter(re.split(r"(?<=\.) ", text)[0].rstrip(".").strip())


def shorter(text: str) -> str:
    """At most MOST characters: cut at a colon or semicolon, otherwise at a comma or bracket."""
    for marks in (r"[:;] ", r",? \(|, "):
        while len(text) > MOST and (cuts := [one.start() for one in re.finditer(marks, text)]):
            text = text[: cuts[-1]]
    return text


def line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth + name:{WIDTH}} {text}".rstrip()


def package(folder: Path, depth: int) -> Iterator[str]:
    init = folder / "__init__.py"
    yield line(f"{folder.name}/", phrase(init) if init.is_file() else "", depth)
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield line(file.name, phrase(file), depth + 1)


def tree() -> str:
    contract = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contract["contracts"][0]["layers"]]
    root = PROJECT / "intern"
    rows = [line("intern/", "", 0)]
    ordered = [one for layer in layers for one in layer]
    rest = {one.stem for one in root.iterdir() if one.suffix == ".py" or (one / "__init__.py").is_file()}
    for name in ordered + sorted(rest - {"__init__", *ordered}):
        if (root / f"{name}.py").is_file():
            rows.append(line(f"{name}.py", phrase(root / f"{name}.py"), 1))
        else:
            rows += package(root / name, 1)
    for name in ("hydra_plugins", "scripts"):
        rows += package(PROJECT / name, 0)
    return "```text\n" + "\n".join(rows) + "\n```\n"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    wanted = f"{before}{BEGIN}\n{tree()}\n{END}{after}"
    if sys.argv[1:] == ["--check"]:
        if page != wanted:
            sys.exit("docs/architecture.md does not show the source tree as it is: run python scripts/source_tree.py")
    elif page != wanted:
        PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
