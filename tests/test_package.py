"""What importing costs and pulls in, and which room may import which."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_accel as la

PACKAGE = Path(la.__file__).parent
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
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
        "lightning_accel.engines.tensorrt.build; print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert not set(loaded) & {"torch", "lightning", "matplotlib", "wandb"}


NAMESPACES = (
    "language_models",
    "losses",
    "onnx",
    "teachers",
    "pruning",
    "quantization",
    "engines",
    "benchmarking",
    "reports",
)


@pytest.mark.parametrize("space", ["", *NAMESPACES])
def test_every_public_name_resolves(space):
    module = getattr(la, space) if space else la
    assert {*dir(module), "__version__"} == {*module.__all__, "__version__"}
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("space", ["", *NAMESPACES])
def test_type_checkers_see_the_names_that_are_resolved_lazily(space):
    module = getattr(la, space) if space else la
    (block,) = (node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module.removeprefix("lightning_accel").removeprefix("."))
        for node in block.body
        for alias in node.names
    }
    assert seen == module._PUBLIC


def test_the_version_is_that_of_the_distribution():
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
        ("onnxruntime", "la.load_runner('{file}')", "runtime"),
        ("torch", "la.WeightPruning", "cpu"),
        ("lightning", "la.plan", "cpu"),
        ("openvino", "la.load_runner('{file}', 'openvino')", "openvino"),
        ("tensorrt_rtx", "la.engines.build_engine('{file}', 'model.engine', library='tensorrt_rtx')", "tensorrt-rtx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, module, code, extra):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    says = run(BLOCKED.format(module=module, code=code.format(file=file)))
    assert f"needs the package `{module}`, which is not installed: " in says
    assert says.endswith(f'pip install "lightning-accel[{extra}]"')


def test_imports_go_one_way():
    """The contracts of pyproject.toml: rooms import downwards only, engines know no torch, and there are no circles."""
    done = subprocess.run([LINT_IMPORTS, "--no-logo"], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stdout
