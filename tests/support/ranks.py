"""Run a script in several processes under torchrun, and end all of them for certain."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """How a script ended: exit code (``None``: it was killed), standard output and error together, and when, in seconds since 1970."""

    code: int | None
    text: str
    ended: float


def torchrun(script: str, folder: Path, *arguments: str, ranks: int = 2, seconds: float = 90) -> Done:
    """Run a script's text with `torchrun --nproc_per_node`; after `seconds` its whole process group is killed."""
    path = folder / "script.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend", "c10d"]
    return run_killed([*launch, "--rdzv-endpoint", "localhost:0", str(path), *arguments], folder, seconds)


def run_killed(command: list[str], folder: Path, seconds: float) -> Done:
    """Run a command in a session of its own, which is killed after `seconds`."""
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            ended = time.time()
            _kill_session(process.pid)
            process.wait()
        output.seek(0)
        return Done(code, output.read(), ended)


def _kill_session(leader: int) -> None:
    """Kill every process of a session: torchrun's workers are in process groups of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue
