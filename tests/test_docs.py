"""The code blocks of README and docs run with the package alone; links, commands, options and files in them exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_accel as la
from lightning_accel.cli.lightning_cli import AccelTrainer
from lightning_accel.cli.options import with_underscores
from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS, command_parser
from lightning_accel.distillation.losses.registry import loss_names
from lightning_accel.engines.registry import all_engines
from lightning_accel.quantization.arithmetic.targets import target_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SITE = ("api/index.md",)  # generated when the site is built
OWN = ("examples", "experiments", "tests")  # packages of the repository that aren't installed


def blocks(page, kind):
    return [block for block in BLOCK.finditer(page.read_text()) if block[1] == kind]


def name(page):
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if blocks(page, "python") and page not in (*TUTORIALS, ROOT / "README.md")]


def test_the_readme_has_code():
    assert blocks(ROOT / "README.md", "python")
    assert len(TUTORIALS) == 4


def without_the_repository(monkeypatch):
    """Only what is installed can be imported."""
    for package in {*OWN, *(module for module in sys.modules if module.split(".")[0] in OWN)}:
        monkeypatch.setitem(sys.modules, package, None)


def run_python(block, page, namespace):
    text = page.read_text()
    line = text[: block.start(2)].count("\n")  # so that a traceback shows the line of the page
    exec(compile("\n" * line + block[2], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_the_repository(monkeypatch)
    namespace: dict = {}
    for block in blocks(page, "python"):
        run_python(block, page, namespace)


OPTIONAL = (
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "wandb",
    "transformers",
    "mlxtend",
    "tensorboard",
    "argcomplete",
    "scipy",
    *OWN,
)
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *args, **kwargs):
        for found in super().find_distributions(*args, **kwargs):
            if found.metadata["Name"].lower().replace("-", "_") not in {blocked!r}:
                yield found
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_the_readme_needs_the_extra_cpu_and_no_other_package(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "lightning_accel").symlink_to(Path(la.__file__).parent)
    code = WITHOUT.format(blocked=OPTIONAL) + blocks(ROOT / "README.md", "python")[0][2]
    code += "import numpy as np; print(runner(np.zeros((2, 1, 28, 28), np.float32)).shape)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "(2, 10)"


def test_the_readme_is_short_enough_to_be_ten_lines():
    (block,) = blocks(ROOT / "README.md", "python")
    module, *rest = block[2][block[2].index("module = ") :].splitlines()
    assert len([module, *rest]) <= 10


# --- tutorials: commands run, too


def run_line(line, folder):
    """Run one line of a shell; returns the folder in which the next one runs."""
    command, _, comment = line.partition("  #")
    words = shlex.split(command)
    if words[0] == "cd":
        return folder / words[1]
    if words[0] == "pip":
        return folder
    assert words[0] == "lightning-accel", line
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parent / "site"), str(folder)])}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_accel", *words[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    expected = int(code[1]) if (code := re.search(r"exit code (\d)", comment)) else 0
    assert done.returncode == expected, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return folder


@pytest.mark.parametrize("page", TUTORIALS, ids=name)
@pytest.mark.timeout(600)
def test_a_tutorial_runs_from_an_empty_folder(page, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "lightning_accel").symlink_to(Path(la.__file__).parent)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "site").symlink_to(tmp_path / "site")
    without_the_repository(monkeypatch)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("model", "data", "my_net"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    namespace: dict = {}
    for block in BLOCK.finditer(page.read_text()):
        monkeypatch.chdir(folder)
        if block[1] == "python":
            sys.path.insert(0, str(folder))
            run_python(block, page, namespace)
        else:
            for line in block[2].splitlines():
                folder = run_line(line, folder)
    for module in ("model", "data", "my_net"):
        sys.modules.pop(module, None)


# --- what pages refer to


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith(f"{REPOSITORY}/blob/main/"):
            path = ROOT / target.removeprefix(f"{REPOSITORY}/blob/main/")
        elif target.startswith(raw := REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"):
            path = ROOT / target.removeprefix(raw)
        elif "://" in target or target in SITE:
            continue
        else:
            path = page.parent / target if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link


def anchors(path):
    """As MkDocs and GitHub derive them from headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_works_on_pypi():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_modules_and_configs_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]+)`", text):
        assert f"\n{target}:" in makefile, target
    for module in re.findall(r"python -m ((?:experiments|examples)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).is_file(), config


def options_of(command):
    if command in COMMANDS:
        return {name.lstrip("-") for name in command_parser(command)._option_string_actions}
    own = AccelTrainer.__dict__.get(command) or getattr(AccelTrainer, command)
    names = own.__code__.co_varnames[: own.__code__.co_argcount + own.__code__.co_kwonlyargcount]
    return {*(name.replace("_", "-") for name in names), "c", "config", "help", "print-config"}


def code_of(page):
    """Lines of code blocks, and code in the text."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"(?<!`)`([^`\n]+)`", text)])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page):
    for command, rest in re.findall(r"^(?:.*&& )?lightning-accel ([a-z][a-z-]*)([^\n#]*)", code_of(page), re.MULTILINE):
        command = command.replace("-", "_")
        assert command in COMMANDS or command in TRAINER_COMMANDS, f"{command}{rest}"
        for option in re.findall(r"(?<!\S)--?([a-z][\w.-]*)", rest):
            known = option in options_of(command) or option.startswith(("trainer.", "model.", "data."))
            assert known, f"lightning-accel {command}{rest}"
            assert with_underscores(f"--{option}").replace("_", "-") == f"--{option}", (
                "options are documented with dashes"
            )


# --- what must be documented


def test_every_loss_target_engine_and_command_is_documented():
    rows = {
        "distillation.md": loss_names(),
        "quantization.md": target_names(),
        "export.md": [engine.name for engine in all_engines()],
        "command-line.md": [*COMMANDS, *TRAINER_COMMANDS],
    }
    for page, names in rows.items():
        lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("|")]
        for each in names:
            assert any(f"`{each}`" in line.split("|")[1] for line in lines), f"{each} has no row in docs/{page}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    nav = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_docstrings_cite_laws_that_exist():
    laws = set(re.findall(r"^(\d+)\. \*\*", (DOCS / "architecture.md").read_text(), re.MULTILINE))
    cited = {
        n for path in (ROOT / "lightning_accel").rglob("*.py") for n in re.findall(r"\blaw (\d+)", path.read_text())
    }
    assert cited
    assert cited <= laws
    assert laws == {str(number) for number in range(1, 16)}


def test_the_reference_lists_every_public_name(monkeypatch):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    monkeypatch.syspath_prepend(str(DOCS))
    pages = importlib.import_module("api_pages").pages()
    index = pages["api/index.md"]
    names = {
        name
        for space in (la, *(getattr(la, n) for n in la.__all__ if not la._PUBLIC.get(n, "x")))
        for name in space.__all__
    }
    spaces = {name for name, module in la._PUBLIC.items() if not module}
    assert all(f"lightning_accel.{space}" in index for space in spaces)
    for name in names - spaces - {"__version__"}:
        assert sum(f".{name}\n" in text for text in pages.values()) == 1, name
        assert f"`{name}`" in index
