"""Resolve layer paths such as ``"net.layer3"``, ``"encoder.*.attention"`` or ``"bert[hidden_states][-1]"``."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lightning_accel.distillation.layers.selection import split_path
from lightning_accel.errors import InvalidArgumentError, RunError

_Recorded = dict[str, list[tuple[Any, int]]]  # module path -> output and its version


def expand(root: nn.Module, paths: str | Sequence[str], argument: str) -> list[str]:
    """Expand globs in paths to the matching layers, in the order of the network.

    Args:
        root: the network.
        paths: one or several; ``*`` and ``?`` match parts of one name, not dots.
        argument: name of the argument, for messages.

    Returns:
        Paths without globs; selections in brackets are kept.

    Raises:
        InvalidArgumentError: a path doesn't exist; the message lists near matches.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
        >>> expand(net, "body.*", "student_layer")
        ['body.0', 'body.1']
    """
    names = [name for name, _ in root.named_modules() if name]
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        module, _ = split_path(path, argument)
        suffix = path[len(module) :]
        pattern = re.escape(module).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
        matches = [name for name in names if re.fullmatch(pattern, name)] if module else [""]
        if not matches:
            near = get_close_matches(module, names, n=4, cutoff=0.5) or names[:8]
            raise InvalidArgumentError(
                f"Argument `{argument}` must be the path of a layer of {type(root).__name__}, but got {path!r}. "
                f"Near it: {', '.join(near) or 'nothing, it has no layers'}."
            )
        found += [name + suffix for name in matches]
    return found


@contextmanager
def recorded(root: nn.Module, modules: Sequence[str]) -> Iterator[_Recorded]:
    """Context that records the outputs of submodules; hooks are removed afterwards.

    Args:
        root: the network.
        modules: dotted paths of submodules.
    """
    found: _Recorded = {path: [] for path in modules}

    def keep(path: str, output: Any) -> None:
        found[path].append((output, _version(output)))

    with ExitStack() as stack:
        for path in modules:
            hook = root.get_submodule(path).register_forward_hook(lambda m, a, output, path=path: keep(path, output))
            stack.callback(hook.remove)
        yield found


def once(found: _Recorded, path: str, argument: str) -> Any:
    """Output of a layer that was called exactly once and was not overwritten since.

    Raises:
        RunError: the layer wasn't called exactly once, or its output was overwritten.
    """
    calls = found[path]
    if len(calls) != 1:
        times = f"{len(calls)} times" if calls else "not at all"
        raise RunError(
            f"Argument `{argument}` must name a layer that is called once in a step, but {path!r} was called {times}. "
            "Name the layer around it, or one that has a single call."
        )
    output, version = calls[0]
    if _version(output) != version:
        raise RunError(
            f"Argument `{argument}` must name a layer whose output stays, but that of {path!r} was overwritten in place by a "
            "later layer, ReLU(inplace=True) for instance. Name that layer."
        )
    return output


def _version(output: Any) -> int:
    """Version counter of a tensor; constant in inference mode."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0
