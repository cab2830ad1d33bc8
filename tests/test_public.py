"""What others may import, by module: a name comes, goes or moves on purpose, in the same change as this list.

Written anew with: python -m tests.test_public
"""

import ast
from pathlib import Path

import ssd_torchrec

ROOT = Path(ssd_torchrec.__file__).parent
LIST = Path(__file__).with_name("public_names.txt")


def public_names() -> list[str]:
    """module: names of the classes, functions and constants that a module defines without an underscore."""
    lines = []
    for file in sorted(ROOT.rglob("*.py")):
        module = ".".join(("ssd_torchrec", *file.relative_to(ROOT).with_suffix("").parts))
        names = sorted(name for node in ast.parse(file.read_text()).body for name in defined(node) if name[0] != "_")
        if names:
            lines.append(f"{module}: {' '.join(names)}")
    return lines


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_public_names_are_the_listed_ones():
    assert public_names() == LIST.read_text().splitlines()


def test_every_public_class_and_function_says_what_it_is():
    for file in ROOT.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name}"


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n")
