"""What importing costs and pulls in, and which room may import which."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_accel as la

PACKAGE = Path(la.__file__).parent
HEAVY = (
    "torch",
    "torch_pruning",
    "lightning",
    "onnx",
    "onnxruntime",
    "openvino",
    "wandb",
    "tensorrt",
    "tensorrt_rtx",
    "matplotlib",
)


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_it_imports_nothing_heavy():
    loaded = run("import sys, lightning_accel; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "lightning_accel" in loaded
    assert not set(loaded) & set(HEAVY)


def test_a_runner_needs_neither_torch_nor_lightning():
    loaded = run(
        "import sys; from lightning_accel import load_runner; import lightning_accel.engines.onnxruntime, "
        "lightning_accel.engines.tensorrt; print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert not set(loaded) & {"torch", "lightning", "matplotlib", "wandb"}


def test_every_public_name_resolves():
    assert dir(la) == sorted(la.__all__)
    assert all(getattr(la, name) is not None for name in la.__all__)
    assert la.__version__ == version("lightning-accel")
    assert (PACKAGE / "py.typed").is_file()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module `lightning_accel` has no attribute `Prunning`"):
        _ = la.Prunning


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import lightning_accel as la
try:
    {code}
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "code", "extra"),
    [
        ("onnxruntime", "la.load_runner('{file}')", "cpu"),
        ("openvino", "la.load_runner('{file}', 'openvino')", "openvino"),
        ("tensorrt_rtx", "la.build_engine('{file}', 'model.engine', library='tensorrt_rtx')", "tensorrt-rtx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, module, code, extra):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    says = run(BLOCKED.format(module=module, code=code.format(file=file)))
    assert f"needs the package `{module}`, which is not installed: " in says
    assert says.endswith(f'pip install "lightning-accel[{extra}]"')


# --- imports go one way: engines <- benchmarking, and structure <- pruning, distillation, quantization <- export <- cli

ROOMS = ("engines", "benchmarking", "pruning", "distillation", "quantization", "export", "commands")
SHARED = {
    "schedules",
    "layer_plot",
    "monitors",
    "rebinding",
    "structure",
    "compression",
    "call_names",
    "call_shapes",
    "dynamic_linear",
    "inputs",
    "globs",
    "extras",
}
MAY_IMPORT = {
    "engines": {"extras", "dynamic_linear"},
    "benchmarking": {"engines", "extras"},
    "pruning": SHARED,
    "distillation": SHARED | {"engines"},
    "quantization": SHARED | {"engines"},
    "export": SHARED | {"engines", "benchmarking", "pruning", "distillation", "quantization"},
    "commands": {"engines", "benchmarking", "export", "extras"},
}


def imports_of(file: Path, *, at_top_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if at_top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(imports: set[str]) -> set[str]:
    """The rooms and shared modules of this package among imports."""
    parts = {name.split(".")[1] for name in imports if name.startswith("lightning_accel.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    files = sorted((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        assert own(imports_of(file)) <= MAY_IMPORT[room] | {room}, file


def test_what_all_rooms_share_imports_no_room():
    for name in sorted(SHARED):
        assert own(imports_of(PACKAGE / f"{name}.py")) <= SHARED, name


def test_engines_know_no_torch_except_the_one_that_is_torch():
    for file in sorted((PACKAGE / "engines").glob("*.py")):
        loaded = {name.split(".")[0] for name in imports_of(file, at_top_only=file.name == "pytorch.py")}
        assert not loaded & {"torch", "lightning"}, file


def test_nothing_imports_the_command_line():
    for file in sorted(PACKAGE.rglob("*.py")):
        assert "cli" not in own(imports_of(file)), file
