"""Build a TensorRT engine from an ONNX file, or rebuild the engine of a bundle for this machine, and print the trtexec command."""

import argparse
import sys
from pathlib import Path

from lightning_accel.cli.arrays import load_arrays
from lightning_accel.cli.options import add_list_option
from lightning_accel.engines.manifest import MANIFEST
from lightning_accel.engines.tensorrt.build import COMPATIBILITY, EngineInfo, build_engine
from lightning_accel.engines.tensorrt.command import equivalent_command
from lightning_accel.errors import InvalidArgumentError

_PRECISIONS = ("file", "fp16", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", type=Path, help="the ONNX file, or a bundle whose engine is replaced")
    parser.add_argument("--engine", choices=["tensorrt", "tensorrt_rtx"], help="library; default: the one installed")
    parser.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="file",
        help="precision of the file's float32 nodes, written into a copy of the file beside the engine; default: keep the file's",
    )
    parser.add_argument("--data", type=Path, help="samples from which ranges are determined for fp16 and bf16")
    add_list_option(parser, "--keep", help="glob of nodes that stay float32", default=[])
    parser.add_argument("--out", type=Path, help="path of the engine; default: beside the ONNX file")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="INPUT=MIN,OPT,MAX",
        help="shapes of a dynamic input, e.g. x=1x3x32x32,8x3x32x32,64x3x32x32",
    )
    parser.add_argument("--workspace", type=int, metavar="BYTES", help="memory limit for intermediate results")
    parser.add_argument(
        "--level", type=int, help="builder optimization level: 0 builds fastest, 5 produces the fastest engine"
    )
    parser.add_argument("--timing-cache", type=Path, help="file that stores timings between builds")
    parser.add_argument("--dense", action="store_true", help="don't use kernels for 2:4 sparse weights")
    parser.add_argument("--compatibility", choices=COMPATIBILITY, help="further GPUs that the engine must run on")


def run(arguments: argparse.Namespace) -> int:
    """Build and print."""
    if arguments.model.is_dir():
        return _rebuild(arguments)
    source = _lowered(arguments) if arguments.precision != "file" else arguments.model
    _print(_build(arguments, source, arguments.out), source)
    return 0


def _build(arguments: argparse.Namespace, source: Path, out: Path | None) -> EngineInfo:
    shown = sys.stderr.isatty()
    info = build_engine(
        source,
        out,
        library=arguments.engine,
        profile=dict(map(parse_profile, arguments.profile)),
        workspace_bytes=arguments.workspace,
        level=arguments.level,
        timing_cache=arguments.timing_cache,
        sparse=False if arguments.dense else None,
        compatibility=arguments.compatibility,
        progress=_show if shown else None,
    )
    if shown:
        print(file=sys.stderr)
    return info


def _lowered(arguments: argparse.Namespace) -> Path:
    from lightning_accel.onnx.half_precision import check_lowered, lower_precision

    out = arguments.model.with_suffix(f".{arguments.precision}.onnx")
    samples = None if arguments.data is None else load_arrays(arguments.data, _inputs_of(arguments.model))
    report = lower_precision(arguments.model, out, arguments.precision, samples=samples, keep=arguments.keep)
    check_lowered(arguments.model, out, arguments.precision)
    print(f"{out}: {report.lowered} nodes in {arguments.precision}, {len(report.kept)} kept in float32")
    for node, why in report.kept.items():
        print(f"  {node}: {why}")
    if samples is None:
        print("  no ranges were checked: pass --data to find values that exceed the range of the precision")
    result: Path = out
    return result


def _inputs_of(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(str(path), load_external_data=False).graph.input]


def _print(info: EngineInfo, source: Path) -> None:
    size = info.bytes / 1e6
    print(
        f"{info.path}: {info.precision}, {info.library} {info.version}, {size:.1f} MB, {info.seconds:.1f} s, {info.status}"
    )
    if info.sparse_layers:
        print(f"  2:4 sparse weights: {len(info.sparse_layers)} layers")
    for line in info.warnings:
        print(f"  warning: {line}")
    print(f"the same with NVIDIA's tool: {equivalent_command(info, source)}")


def _rebuild(arguments: argparse.Namespace) -> int:
    """Replace the engine of a bundle with one for this machine."""
    from lightning_accel.bundle.writer import replace_engine

    if arguments.precision != "file" or arguments.out is not None:
        raise InvalidArgumentError(
            f"Argument `--precision` and `--out` must be left out for a bundle, because its {MANIFEST} sets both."
        )
    info, source = replace_engine(arguments.model, lambda path, out: _build(arguments, path, out))
    _print(info, source)
    print(f"verify it here: lightning-accel verify {arguments.model} --engine tensorrt --record")
    return 0


def parse_profile(text: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """``x=1x3,8x3,64x3`` as the input's name and its three shapes.

    Raises:
        InvalidArgumentError: it doesn't read like that.
    """
    name, _, shapes = text.partition("=")
    try:
        parsed = tuple(tuple(int(size) for size in shape.split("x")) for shape in shapes.split(","))
    except ValueError:
        parsed = ()
    if not name or len(parsed) != 3:
        raise InvalidArgumentError(
            f"Argument `--profile` must read INPUT=MIN,OPT,MAX like x=1x3x8x8,8x3x8x8,64x3x8x8, but got {text!r}."
        )
    return name, parsed


def _show(phase: str, share: float) -> None:
    print(f"\r{phase[:60]:60s} {share:4.0%}", end="", file=sys.stderr, flush=True)
