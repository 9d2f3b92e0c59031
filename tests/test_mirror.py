"""The tests mirror the package: each module has a test file of its name, or a line that says where it is tested."""

import tomllib
from pathlib import Path

import lightning_accel

PACKAGE, TESTS = Path(lightning_accel.__file__).parent, Path(__file__).parent
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if (path.name not in ("__init__.py", "__main__.py") and path.parent != PACKAGE) or path.name == "errors.py"
}
ELSEWHERE = tomllib.loads((TESTS / "tested_in.toml").read_text())


def mirror(module: str) -> Path:
    path = TESTS / f"{module}.py"
    return path.with_name(f"test_{path.name}")


def test_every_module_has_a_test_file_or_a_line():
    assert {module for module in MODULES if not mirror(module).is_file()} == ELSEWHERE.keys()


def test_every_line_names_a_test_file():
    assert {name for name in ELSEWHERE.values() if not (TESTS / f"{name}.py").is_file()} == set()
