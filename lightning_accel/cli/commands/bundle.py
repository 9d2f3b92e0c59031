"""Write a bundle as a model repository of Triton Inference Server."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--triton", type=Path, required=True, metavar="REPOSITORY", help="Triton's model repository")
    parser.add_argument("--name", help="name of the model; default: name of the bundle's folder")
    parser.add_argument("--engine", help="engine of the bundle; default: the bundle's default")
    parser.add_argument(
        "--backend",
        help="python: copy the bundle, and reproduce its kept samples in the server; default: the engine's own",
    )
    parser.add_argument("--version", type=int, default=1, help="version of the model; default 1")
    parser.add_argument("--max-batch", type=int, default=64, help="largest batch; default 64")


def run(arguments: argparse.Namespace) -> int:
    """Write and print."""
    from lightning_accel.serving.triton import write_triton

    name = arguments.name or arguments.bundle.resolve().name
    folder = write_triton(
        arguments.bundle,
        arguments.triton,
        name=name,
        engine=arguments.engine,
        backend=arguments.backend,
        version=arguments.version,
        max_batch=arguments.max_batch,
    )
    print(f"{folder}: {name} for Triton; start it with: tritonserver --model-repository={arguments.triton.resolve()}")
    return 0
