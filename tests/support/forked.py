"""Run modules as `python -m` does, each in a process of its own, which begins with torch and Lightning imported.

Importing them takes longer than many a script. They are imported once, by a process that does nothing else: it starts no threads, and forks
for each run. So a run sees nothing of the tests or of another run. What is tested for what it imports, or for how it is installed, takes
an interpreter of its own.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_module(name: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same as `subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True)`.

    Args:
        name: of the module.
        arguments: of the command line.
        cwd: folder that it runs in.
        environment: variables beyond those of the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "err"]
        wish = {"name": name, "arguments": arguments, "cwd": str(cwd), "environment": environment}
        server = _server()
        print(json.dumps({**wish, "files": [str(file) for file in files]}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        out, err = (file.read_text() for file in files)
        return subprocess.CompletedProcess(["python", "-m", name, *arguments], code, out, err)


@cache
def _server() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    atexit.register(_ended, process)
    return process


def _ended(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait()


def _serve() -> None:
    import lightning
    import torch

    import lightning_accel.export.callback
    import lightning_accel.quantization.ptq

    del lightning, torch, lightning_accel
    for line in sys.stdin:
        wish = json.loads(line)
        if (child := os.fork()) == 0:
            return _run(wish)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _run(wish: dict) -> None:
    import runpy

    for number, file in enumerate([os.devnull, *wish["files"]]):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(wish["cwd"])
    os.environ.update(wish["environment"])
    sys.path[0] = wish["cwd"]
    sys.argv = [wish["name"], *wish["arguments"]]
    runpy.run_module(wish["name"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
