"""Pages of the API reference, written while MkDocs builds the site: one for each room, from the public names of the package."""

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "lightning_accel"


def public_names() -> dict[str, list[tuple[str, str]]]:
    """Room -> name and module of each public name in it, read from ``lightning_accel/__init__.py`` without importing it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_PUBLIC"
    )
    rooms: dict[str, list[tuple[str, str]]] = {}
    for name, module in ast.literal_eval(table).items():
        rooms.setdefault(module.split(".")[0], []).append((name, module))
    return rooms


def purpose(room: str) -> str:
    """First line of a room's docstring."""
    path = PACKAGE / room / "__init__.py"
    file = path if path.is_file() else PACKAGE / f"{room}.py"
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def pages() -> dict[str, str]:
    """Path in the docs -> Markdown."""
    rooms = public_names()
    title = {room: "ONNX" if room == "onnx" else room.replace("_", " ").capitalize() for room in rooms}
    made = {}
    for room, names in rooms.items():
        objects = "\n".join(f"\n::: lightning_accel.{module}.{name}\n" for name, module in names)
        made[f"api/{room}.md"] = f"# {title[room]}\n\n{purpose(room)}\n{objects}"
    rows = [
        f"| [{title[room]}]({room}.md) | {', '.join(f'`{name}`' for name, _ in names)} |"
        for room, names in rooms.items()
    ]
    head = "# Python API\n\nAll names are importable from `lightning_accel`.\n\n| room | names |\n|---|---|\n"
    made["api/index.md"] = head + "\n".join(rows) + "\n"
    return made


def on_config(config: MkDocsConfig) -> None:
    """Replace the entry ``api/`` of the navigation by the pages."""
    ordered = sorted(pages(), key=lambda path: (path != "api/index.md", path))
    _replace(config.nav, "api/", ordered)


def _replace(nav: Any, entry: str, pages: list[str]) -> None:
    for item in nav if isinstance(nav, list) else ():
        for key, value in item.items() if isinstance(item, dict) else ():
            if value == entry:
                item[key] = list(pages)
            _replace(value, entry, pages)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
