"""The same faulty files given to Polygraphy's comparison and to ours: which are found, and is the node named?

Both get the same samples and PyTorch's outputs for them. Polygraphy compares an ONNX Runtime run with its defaults, absolute and
relative tolerance 1e-5, as `polygraphy run model.onnx --onnxrt --load-outputs` does. Right files are given too: whoever calls
those faulty raises a false alarm.

    python -m experiments.found_faults [--quick]
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from experiments import print_environment
from experiments.engine_zoo import quantize_
from lightning_accel.calls.example import named_arrays
from lightning_accel.errors import VerificationError
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.verification.compare import Network
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import FILES
from tests.support.faults import FAULTS, INTEGER_FAULTS, Fault, inputs, victim
from tests.support.zoo import ZOO, network, samples


@dataclass
class Case:
    """A network, its file, and samples of its inputs."""

    export: OnnxExport
    network: Network
    feeds: dict[str, np.ndarray]

    @staticmethod
    def of(net: torch.nn.Module, call: tuple[torch.Tensor, ...], path: Path) -> "Case":
        """Export a network."""
        export = export_onnx(net, call, path)
        return Case(export, ModuleNetwork(net, export), named_arrays((call, {}), export.input_names))


def ours(case: Case) -> str:
    """``"found"``, ``"found, named"`` or ``""``."""
    try:
        if case.export.trained:
            check_integers(case.export.path, case.export.trained)
        prove_file(case.export, case.network, case.feeds, tolerance=FILES["int8" if case.export.trained else "fp32"])
    except VerificationError as error:
        named = "First diverging node" in str(error) or "`" in str(error).partition(" must ")[0]
        return "found, named" if named else "found"
    return ""


def polygraphys(case: Case) -> str:
    """The same for Polygraphy, which compares outputs."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, CompareFunc, IterationResult, RunResults
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    try:
        found = Comparator.run([OnnxrtRunner(SessionFromOnnx(str(case.export.path)))], data_loader=[case.feeds])
        reference = RunResults([("pytorch", [IterationResult(dict(case.network(case.feeds)))])])
        reference.extend(found)
        same = Comparator.compare_accuracy(reference, compare_func=CompareFunc.simple())
    except Exception:  # a file that can't be run is found, too
        return "found"
    return "" if bool(same) else "found"


def give(case: Case, faults: list[Fault], checks: dict[str, Callable[[Case], str]]) -> list[tuple[str, dict[str, str]]]:
    """Each fault in turn to each check."""
    right, rows = case.export.path.read_bytes(), []
    for fault in faults:
        model = onnx.load_from_string(right)
        fault.change(model)
        onnx.save(model, case.export.path)
        rows.append((fault.name, {name: check(case) for name, check in checks.items()}))
    case.export.path.write_bytes(right)
    return rows


def main() -> None:
    """Inject, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few faults and one right network")
    arguments: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    print_environment()
    torch.manual_seed(3)
    checks: dict[str, Callable[[Case], str]] = {"lightning-accel": ours, "Polygraphy": polygraphys}
    few = 4 if arguments.quick else None
    with tempfile.TemporaryDirectory() as folder:
        path, call = Path(folder) / "model.onnx", inputs(64)
        rows = give(Case.of(victim(), call, path), FAULTS[:few], checks)
        net = victim()
        quantize_(net, call)
        rows += [(f"{n} (int8)", f) for n, f in give(Case.of(net, call, path), INTEGER_FAULTS[:few], checks)]
        alarms: dict[str, list[str]] = {name: [] for name in checks}
        right = 0
        for name in ["mlp"] if arguments.quick else list(ZOO):
            for int8 in (False, True):
                net, call = network(name), samples(name, 64)
                if int8:
                    quantize_(net, call)
                case = Case.of(net, call, path)
                right += 1
                for check, run in checks.items():
                    alarms[check] += [f"{name} {'int8' if int8 else 'fp32'}"] if run(case) else []
    print("\n| fault | " + " | ".join(checks) + " |\n|---|" + "---|" * len(checks))
    for name, found in rows:
        print(f"| {name} | " + " | ".join(found[check] or "missed" for check in checks) + " |")
    for check in checks:
        named = sum("named" in found[check] for _, found in rows)
        says = f" ({', '.join(alarms[check])})" if alarms[check] else ""
        print(f"{check}: false alarms on {len(alarms[check])} of {right} right files{says}")
        print(f"{check}: place named for {named} of {len(rows)} faults")
    counts = {check: sum(bool(found[check]) for _, found in rows) for check in checks}
    reached = "reached" if counts["lightning-accel"] == len(rows) and not alarms["lightning-accel"] else "missed"
    print(
        f"faults found: {counts['lightning-accel']} of {len(rows)}, Polygraphy {counts['Polygraphy']} "
        f"(target: all, and no false alarm, {reached})"
    )


if __name__ == "__main__":
    main()
