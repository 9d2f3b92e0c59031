"""Pages of the API reference, written while MkDocs builds the site: one for each room, from the public names of the package."""

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "lightning_accel"


NAMESPACES = (
    "language_models",
    "losses",
    "teachers",
    "pruning",
    "quantization",
    "engines",
    "onnx",
    "benchmarking",
    "reports",
)


def public_names(space: str = "") -> dict[str, str]:
    """Name -> module of each public name of ``lightning_accel`` or a namespace in it, read without importing it."""
    tree = ast.parse(_file(space).read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_PUBLIC"
    )
    return {name: module for name, module in ast.literal_eval(table).items() if module}


def _file(space: str) -> Path:
    folder = PACKAGE / space
    return folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{space}.py"


def pages() -> dict[str, str]:
    """Path in the docs -> Markdown."""
    made = {}
    rows = []
    for space in ("", *NAMESPACES):
        names = public_names(space)
        title = f"lightning_accel.{space}" if space else "lightning_accel"
        purpose = (ast.get_docstring(ast.parse(_file(space).read_text())) or "").partition("\n")[0]
        own = {name: module for name, module in names.items() if not space or name not in public_names()}
        objects = "\n".join(f"\n::: lightning_accel.{module}.{name}\n" for name, module in own.items())
        if shared := [f"[`{name}`](top.md)" for name in names if name not in own]:
            objects = f"Also here: {', '.join(shared)}.\n{objects}"
        page = f"{space or 'top'}.md"
        made[f"api/{page}"] = f"# {title}\n\n{purpose}\n{objects}"
        rows.append(f"| [{title}]({page}) | {', '.join(f'`{name}`' for name in names)} |")
    head = "# Python API\n\n| import from | names |\n|---|---|\n"
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
