"""The user's file and line in a traceback, or behind a node of a captured graph.

Frames of PyTorch, Lightning, the exporter and this library don't help a user, wherever these packages are installed: in a layered
environment there are several ``site-packages``, and a user's own package may be installed as well.
"""

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from torch.fx import Node

_FRAMEWORKS = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "torchao",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "numpy",
    "lightning_accel",
)
_INSTALLED = {"site-packages", "dist-packages"}


def user_line(error: BaseException, module: nn.Module) -> str:
    """``file:line`` of the innermost frame of the user's code in an error and its causes.

    Frames of the project go before frames of installed packages, for instance of a model library.

    Args:
        error: caught from a call of the module.
        module: whose class is named if no frame is the user's.
    """
    frames: list[tuple[str, int]] = []
    seen: BaseException | None = error
    while seen is not None:
        frames += [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(seen.__traceback__)]
        seen = seen.__cause__ or seen.__context__
    return innermost_line(frames) or defined_at(module)


def node_line(node: Node) -> str:
    """``file:line`` of the user's code that a node of a captured graph comes from; empty if it isn't known."""
    trace = node.meta.get("stack_trace") or ""
    return innermost_line((file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', trace))


def defined_at(module: nn.Module) -> str:
    """``file:line`` of a module's class; empty if it has no source file."""
    try:
        source = inspect.getsourcefile(type(module))
        return f"{source}:{inspect.getsourcelines(type(module))[1]}" if source else ""
    except (OSError, TypeError):  # a class that was made at run time, or typed into a console
        return ""


def innermost_line(frames: Iterable[tuple[str, int]]) -> str:
    """``file:line`` of the innermost frame of the user's code; empty if there is none."""
    installed = project = ""
    skipped = tuple(_folders())
    for file, line in frames:
        if file.startswith(("<", *skipped)):
            continue
        parts = set(Path(file).parts)
        if parts & _INSTALLED:
            installed = f"{file}:{line}"
        elif not file.startswith(sysconfig.get_paths()["stdlib"]):
            project = f"{file}:{line}"
    return project or installed


def _folders() -> Iterable[str]:
    """Folders of the frameworks that are loaded, each with its separator."""
    for name in _FRAMEWORKS:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            yield f"{Path(file).parent}/"
