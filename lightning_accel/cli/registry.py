"""The commands of ``lightning-accel``, and the parsers of those that load neither torch nor lightning."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from lightning_accel.cli.options import CommandParser

TRAINER_COMMANDS = {
    "fit": "train; with a ModelExport callback the run ends with a verified bundle",
    "validate": "run the validation loop; --ckpt-path FILE validates a checkpoint as it was trained",
    "test": "run the test loop",
    "predict": "run the predict loop: predict -c CONFIG.yaml",
    "plan": "print what fit would do to each layer and when, and what prevents it; train nothing",
    "export": "write the bundle again from a checkpoint: --ckpt-path FILE",
    "advise": "measure float32 and int8 without training, and say what to do next: --ckpt-path FILE",
    "compress": "find the cheapest recipe within budgets: --ckpt-path FILE --max-drop 0.5 --max-latency-ms 2",
    "latency_table": "measure the latency of a network with fewer channels, for ChannelPruning on another machine or for int8",
    "quantize": "write a verified int8 bundle from a float checkpoint without training: --ckpt-path FILE --target openvino",
}
COMMANDS = {
    "init": "write a LightningModule, a DataModule and a config to start from: init FOLDER",
    "check": "test whether a module can be exported, quantized and built: check package.MyLit --ckpt-path FILE",
    "verify": "check that the engines of a bundle compute the same as its ONNX file on this machine",
    "build": "build a TensorRT engine from an ONNX file, like trtexec",
    "benchmark": "measure all runtime variants of a bundle and select the one that ships; or the latency of several files",
    "compare": "compare two bundles",
    "serve": "serve bundles over HTTP, if this machine reproduces them: serve artifacts --port 8000",
    "predict": "compute a bundle's outputs for files, in processes: predict artifacts --data FILES --out FOLDER",
    "generate": "generate text from a language model's bundle: generate BUNDLE --prompt TEXT",
    "bundle": "write a bundle as a Triton model repository: --triton FOLDER",
    "package": "write a bundle as a package for a platform: package artifacts --oci --out image",
    "doctor": "print what is installed, which engines run or only build here, and how fast and exact int8 is on this CPU",
}


def is_light(words: Sequence[str]) -> bool:
    """Whether a command line is of one of :data:`COMMANDS`. `predict` is of both: the Trainer's takes options alone.

    Args:
        words: the command and what follows.
    """
    if words[0] in TRAINER_COMMANDS:
        return words[0] in COMMANDS and len(words) > 1 and not words[1].startswith("-")
    return words[0] in COMMANDS


def command_parser(name: str) -> CommandParser:
    """The parser of one of :data:`COMMANDS`."""
    module = import_module(f"lightning_accel.cli.commands.{name}")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"lightning-accel {name}", description=module.__doc__, formatter_class=formatter)
    module.add_arguments(parser)
    return parser
