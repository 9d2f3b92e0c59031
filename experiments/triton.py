"""A bundle in a real Triton Inference Server, with its Python backend: what it answers, what it refuses, and when it isn't ready.

The server is the one inside of the package `nvidia-pytriton`, which needs an environment of its own (NumPy 1.26, protobuf 6):

    python -m venv triton && triton/bin/pip install nvidia-pytriton==0.7.0 "tritonclient[http]" "lightning-accel[runtime]"
    python -m experiments.bulk --write-bundle mlp            # in the usual environment
    triton/bin/python -m experiments.triton --bundle mlp     # in that one
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import lightning_accel as la
from experiments import print_environment
from lightning_accel.serving.triton import write_triton

PORT, WIDTH, BATCH = 8951, 16, 64


def server_files() -> tuple[Path, Path, Path]:
    """The server's program, its backends, and its libraries."""
    import pytriton

    root = Path(pytriton.__file__).parent
    server = root / "tritonserver"
    stub = (
        server
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    place = server / "backends" / "python" / stub.name
    if not place.is_file():
        shutil.copy2(stub, place)
    for program in (place, server / "bin" / "tritonserver"):
        program.chmod(0o755)
    return server / "bin" / "tritonserver", server / "backends", root.parent / "nvidia_pytriton.libs"


@contextmanager
def serving(repository: Path, log: Path) -> Iterator[subprocess.Popen]:
    """A server on loopback; it is killed at the end."""
    program, backends, libraries = server_files()
    command = [
        str(program),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--http-address=127.0.0.1",
    ]
    command += [f"--http-port={PORT}", "--allow-grpc=false", "--allow-metrics=false", "--model-control-mode=poll"]
    command += ["--repository-poll-secs=1"]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def until(condition: Callable[[], bool], seconds: float = 40.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return True
        except Exception:  # the server isn't there yet
            pass
        time.sleep(0.3)
    return False


def main() -> None:
    """Serve, ask, and print."""
    import tritonclient.http as client

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bundle", type=Path, required=True, help="a bundle of `python -m experiments.bulk --write-bundle`"
    )
    bundle = parser.parse_args().bundle
    print_environment()
    x = np.random.default_rng(0).standard_normal((256, WIDTH)).astype(np.float32)
    failed: list[str] = []

    def state(what: str, holds: bool) -> None:
        print(f"{what}: {'yes' if holds else 'NO'}")
        if not holds:
            failed.append(what)

    with la.load_runner(bundle, threads=1) as runner:
        name_in, name_out = runner.input_names[0], runner.output_names[0]
        want = np.concatenate([runner.run({name_in: x[i : i + BATCH]})[name_out] for i in range(0, 256, BATCH)])
        single = np.concatenate([runner.run({name_in: x[i : i + 1]})[name_out] for i in range(256)])

    def ask(array: np.ndarray, kind: str = "FP32", name: str = name_in, version: str = "") -> np.ndarray:
        caller = client.InferenceServerClient(f"127.0.0.1:{PORT}", network_timeout=30)
        tensor = client.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        try:
            return caller.infer("mlp", [tensor], model_version=version).as_numpy(name_out)
        finally:
            caller.close()

    with tempfile.TemporaryDirectory() as scratch:
        repository, log = Path(scratch) / "models", Path(scratch) / "log"
        write_triton(bundle, repository, name="mlp", backend="python")
        with serving(repository, log):
            caller = client.InferenceServerClient(f"127.0.0.1:{PORT}")
            state("ready, with its kept samples reproduced", until(lambda: caller.is_model_ready("mlp")))
            print(f"server: {caller.get_server_metadata()}")
            got = np.concatenate([ask(x[i : i + BATCH]) for i in range(0, 256, BATCH)])
            state("batches of 64 are bit for bit the runner's", bool(np.array_equal(got, want)))
            with ThreadPoolExecutor(8) as pool:
                rows = np.concatenate(list(pool.map(lambda i: ask(x[i : i + 1]), range(256))))
            state(
                "256 requests of 8 clients are bit for bit the runner's at batch 1", bool(np.array_equal(rows, single))
            )
            for what, call in {
                "a wrong shape": lambda: ask(x[:1, :3].copy()),
                "a wrong type": lambda: ask(x[:1].astype(np.float64), "FP64"),
                "an unknown input": lambda: ask(x[:1], name="z"),
                "a batch beyond the largest": lambda: ask(np.repeat(x[:1], BATCH + 1, 0)),
            }.items():
                try:
                    call()
                    state(f"{what} is refused", False)
                except client.InferenceServerException as error:
                    state(f"{what} is refused with status {error.status()}", str(error.status()) == "400")
            shutil.copytree(repository / "mlp" / "1", repository / "mlp" / "next")  # as a deployment would
            (repository / "mlp" / "next").rename(repository / "mlp" / "2")
            state("a second version is loaded", until(lambda: caller.is_model_ready("mlp", "2")))
            state("and answers the same", bool(np.array_equal(ask(x[:64], version="2"), want[:64])))
        weights = next((repository / "mlp").rglob("1/bundle/model.onnx"))
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        shutil.rmtree(repository / "mlp" / "2")
        with serving(repository, log):
            caller = client.InferenceServerClient(f"127.0.0.1:{PORT}")
            state(
                "a bundle with one bit changed doesn't become ready",
                not until(lambda: caller.is_model_ready("mlp"), 15.0),
            )
            said = [line for line in log.read_text().splitlines() if "SHA-256" in line]
            state("and the server's log says why", bool(said))
    print(
        f"claims that hold: {'all' if not failed else 'all but ' + '; '.join(failed)} (target: all, {'missed' if failed else 'reached'})"
    )


if __name__ == "__main__":
    main()
