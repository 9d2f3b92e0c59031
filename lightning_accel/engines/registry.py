"""Registry of the engines that can run an exported network, open to other distributions.

An engine of this package is one module below ``lightning_accel.engines`` with a runner and a record, and one line in ``_BUILTIN``. An
engine of another distribution needs no change here: it declares the entry point

.. code-block:: toml

    [project.entry-points."lightning_accel.engines"]
    my_engine = "my_package.engine:ENGINE"

or calls :func:`register_engine` before it is used. Importing this module imports no engine.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from lightning_accel.core.registry import Registry
from lightning_accel.errors import InvalidArgumentError, MissingPackageError

UNLOADABLE = "installed, but can't be loaded"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

_BUILTIN = {  # name -> where its record is; the order is that of reports, tables and defaults
    "onnxruntime": "lightning_accel.engines.onnxruntime:ENGINE",
    "openvino": "lightning_accel.engines.openvino:ENGINE",
    "tensorrt": "lightning_accel.engines.tensorrt.record:ENGINE",
    "pytorch": "lightning_accel.engines.pytorch:ENGINE",
}


@dataclass(frozen=True)
class EngineSpec:
    """The description of an engine: how its runner is loaded, what it runs, and what it needs.

    Functions and classes are given as import paths, ``"package.module:name"``, and imported when they are needed. All fields are
    strings, booleans and containers of strings, so that a record can be sent to another process as JSON.

    Args:
        name: name in ``load_runner(engine=...)``, ``ModelExport(engines=[...])``, manifests and tables.
        runner: the :class:`~lightning_accel.engines.base.Runner` subclass, called as ``runner(path, threads=..., **options)``.
        requirements: distribution -> requirement that installs it with pip. One of the distributions is enough; their versions are
            printed beside measurements.
        modules: import names of the engine, one of which must be installed.
        suffixes: suffixes of the files that ``load_runner`` opens with this engine if no engine is named.
        source: the file of a bundle that the engine runs: ``"onnx"``, ``"program"`` (the ``torch.export`` program) or ``"built"``
            (a file that ``build`` writes).
        build: for ``source="built"``: ``(onnx_file: Path, out: Path, precision: str) -> dict``, which builds an engine file at ``out`` and
            returns entries for the manifest: ``status`` (in words), ``file`` (its name), ``runs_here`` (bool), ``library``, ``version``,
            ``precision``, and further JSON values; ``warnings`` (lines) are shown and not written.
        rest_in_fp16: whether the engine is built from a file whose operators outside of int8 are float16.
        precisions: precisions of the files that the engine runs.
        unavailable: ``() -> str``: why an installed engine can't run on this machine; empty if it can. Default: it can.
        status: ``() -> dict``: label -> status in words for ``doctor``. Default: whether the first of ``modules`` can be imported.
        check: ``() -> None``: raises a MissingPackageError if the engine isn't installed. Default: looks for one of ``modules``.
        refuses: ``(Arithmetic) -> str``: why the engine can't run the integer arithmetic of a target, known without running it; empty if it
            can. Default: nothing is refused.
        probed: whether the engine has integer kernels for CPUs, whose arithmetic is measured before a target is accepted.
        shows_integers: whether quantized tensors of a file must be shown as integers, because the engine fuses a DequantizeLinear only
            if its result isn't a graph output.
        threads: whether the number of CPU threads can be chosen.
        common: whether the engine is in the default comparison of a bundle that wasn't exported for it.

    Raises:
        InvalidArgumentError: a field has a value other than those above.

    Example:
        >>> EngineSpec("toy", "toy.engine:ToyRunner", requirements={"toy": "toy>=1"}, modules=("toy",)).source
        'onnx'
    """

    name: str
    runner: str
    requirements: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    source: str = "onnx"
    build: str = ""
    rest_in_fp16: bool = False
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    unavailable: str = ""
    status: str = ""
    check: str = ""
    refuses: str = ""
    probed: bool = False
    shows_integers: bool = False
    threads: bool = True
    common: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidArgumentError(f"Argument `name` must be a non-empty string, but got {self.name!r}.")
        for argument in ("runner", "build", "unavailable", "status", "check", "refuses"):
            path = getattr(self, argument)
            if (path or argument == "runner") and path.count(":") != 1:
                raise InvalidArgumentError(
                    f"Argument `{argument}` must be an import path like 'package.module:name', but got {path!r}."
                )
        if self.source not in ("onnx", "program", "built"):
            raise InvalidArgumentError(
                f"Argument `source` must be 'onnx', 'program' or 'built', but got {self.source!r}."
            )
        if (self.source == "built") != bool(self.build):
            raise InvalidArgumentError(
                f"Argument `build` must be given if, and only if, `source` is 'built', but got {self.build!r} and {self.source!r}."
            )
        if unknown := sorted(set(self.precisions) - set(PRECISIONS)):
            raise InvalidArgumentError(f"Argument `precisions` must hold some of {PRECISIONS}, but got {unknown}.")

    def load_runner_class(self) -> Any:
        """Import the runner class; the engine itself is imported when a runner is created."""
        return resolve(self.runner)

    def installed(self) -> bool:
        """Whether one of the engine's modules can be found; nothing is imported. An engine without modules is always there."""
        return not self.modules or any(find_spec(module) is not None for module in self.modules)

    def require(self) -> None:
        """Raise unless the engine is installed.

        Raises:
            MissingPackageError: it isn't; the message says how to install it.
        """
        if self.check:
            resolve(self.check)()
        elif not self.installed():
            raise MissingPackageError(
                f"Engine `{self.name}` needs the package `{self.modules[0]}`, which is not installed: {self.how_to_install()}",
                name=self.modules[0],
            )

    def how_to_install(self) -> str:
        """The pip command for the first of ``requirements``."""
        return f'pip install "{next(iter(self.requirements.values()), self.name)}"'

    def why_unavailable(self) -> str:
        """Why the engine can't run on this machine; empty if it can, as far as that is known without running it."""
        return str(resolve(self.unavailable)()) if self.unavailable else ""

    def version(self) -> str:
        """Version of the first of its distributions that is installed; empty if none is."""
        for distribution in self.requirements:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return ""

    def statuses(self) -> dict[str, str]:
        """Label -> status in words: not installed, can't be loaded, or where it runs."""
        if self.status:
            return dict(resolve(self.status)())
        for module in self.modules[:1]:
            if reason := import_error(module):
                return {self.name: reason}
        reason = self.why_unavailable()
        return {self.name: f"doesn't run here: {reason}" if reason else "runs here (CPU)"}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_dict` restores the record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EngineSpec":
        """Restore a record from :meth:`to_dict`."""
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**arguments)


def resolve(path: str) -> Any:
    """Import what an import path ``"package.module:name"`` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


_ENGINES: Registry[EngineSpec] = Registry(
    "engine", "lightning_accel.engines", _BUILTIN, lambda name: resolve(_BUILTIN[name]), EngineSpec
)


def register_engine(engine: EngineSpec) -> None:
    """Make an engine known under its name in this process and in the processes that a benchmark starts.

    Args:
        engine: the record. Registering an equal record again does nothing.

    Raises:
        InvalidArgumentError: another engine has this name.
    """
    _ENGINES.register(engine.name, engine, "engine")


def unregister_engine(name: str) -> None:
    """Remove an engine that :func:`register_engine` added.

    Raises:
        InvalidArgumentError: there is none of that name.
    """
    _ENGINES.unregister(name)


def registered_record(name: str) -> dict[str, Any] | None:
    """The record of an engine that another process doesn't know without being given it; ``None`` for all others."""
    return _ENGINES.registered[name].to_dict() if name in _ENGINES.registered else None


def engine_names() -> list[str]:
    """Names of all engines: those of this package, those of entry points, and those registered in this process."""
    return list(_ENGINES)


def all_engines() -> list[EngineSpec]:
    """Records of all engines, in the order of :func:`engine_names`."""
    return [found for name in engine_names() if (found := _ENGINES.find(name)) is not None]


def engine_named(name: str, argument: str = "engine") -> EngineSpec:
    """Find an engine by its name.

    Args:
        name: of the engine.
        argument: argument that the name was passed as, for the error message.

    Raises:
        InvalidArgumentError: no engine has this name.
    """
    return _ENGINES.get(name, argument)


def probed_engines() -> list[str]:
    """Names of the engines with integer kernels for CPUs."""
    return [engine.name for engine in all_engines() if engine.probed]


def runs_onnx(name: str) -> bool:
    """Whether an engine runs ONNX files themselves, and so any part of one; ``False`` for an unknown engine."""
    found = _ENGINES.find(name)
    return found is not None and found.source == "onnx"


def suffixes() -> dict[str, str]:
    """Suffix of a model file -> the engine that opens it; the first engine that names a suffix has it."""
    found: dict[str, str] = {}
    for engine in all_engines():
        for suffix in engine.suffixes:
            found.setdefault(suffix, engine.name)
    return found


def requirements() -> dict[str, str]:
    """Distribution -> requirement that installs it, of all engines."""
    return {name: needs for engine in all_engines() for name, needs in engine.requirements.items()}


def import_error(module: str) -> str:
    """Import a module; empty, or why it can't be imported, in words."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module else f"{UNLOADABLE}: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{UNLOADABLE}: {error}"
    return ""
