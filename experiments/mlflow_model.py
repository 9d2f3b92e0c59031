"""A bundle as an MLflow model, saved, registered and loaded with the real MLflow: the same bits, and a changed file is refused.

MLflow needs an environment of its own:

    python -m venv mlflow && mlflow/bin/pip install mlflow==3.17.2 "lightning-accel[runtime]"
    python -m experiments.bulk --write-bundle mlp                  # in the usual environment
    mlflow/bin/python -m experiments.mlflow_model --bundle mlp     # in that one
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

import lightning_accel as la
from experiments import print_environment
from lightning_accel.serving.packages.write import write_package


def main() -> None:
    """Save, load, register, change, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bundle", type=Path, required=True, help="a bundle of `python -m experiments.bulk --write-bundle`"
    )
    bundle = parser.parse_args().bundle.resolve()
    warnings.simplefilter("ignore")
    print_environment()
    failed: list[str] = []

    def state(what: str, holds: bool) -> None:
        print(f"{what}: {'yes' if holds else 'NO'}")
        if not holds:
            failed.append(what)

    def refused(what: str, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except Exception as error:  # MLflow wraps errors in several classes
            state(f"{what} is refused: {str(error).splitlines()[0][:120]}", True)
        else:
            state(f"{what} is refused", False)

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        import mlflow

        print(f"mlflow {mlflow.__version__}")
        package = write_package(bundle, "mlflow", Path(scratch) / "package")
        with la.load_runner(bundle) as runner:
            spec, output = runner.inputs[0], runner.output_names[0]
            x = np.random.default_rng(0).standard_normal((64, *spec.shape[1:])).astype(spec.dtype)
            want = runner.run({spec.name: x})[output]
        model = mlflow.pyfunc.load_model(str(package / "model"))
        state("the saved model gives the same bits", bool(np.array_equal(model.predict({spec.name: x})[output], want)))
        refused("a wrong shape", lambda: model.predict({spec.name: x[:, :3]}))
        mlflow.set_tracking_uri(f"sqlite:///{scratch}/registry.db")
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(package / "model"), "model")
        mlflow.register_model(f"runs:/{run.info.run_id}/model", "bundle")
        registered = mlflow.pyfunc.load_model("models:/bundle/1")
        state(
            "the registered model gives the same bits",
            bool(np.array_equal(registered.predict({spec.name: x})[output], want)),
        )
        pickles = [f.name for f in (package / "model").rglob("*") if f.suffix in (".pkl", ".pickle")]
        state("nothing is pickled", not pickles)
        file = next((package / "model").rglob("model.onnx"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        refused("a model with one bit changed", lambda: mlflow.pyfunc.load_model(str(package / "model")))
    print(
        f"claims that hold: {'all' if not failed else 'all but ' + '; '.join(failed)} (target: all, {'missed' if failed else 'reached'})"
    )


if __name__ == "__main__":
    main()
