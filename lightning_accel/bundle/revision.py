"""Git revision of the folder that the run was started in."""

import subprocess
from pathlib import Path


def git_revision(folder: str | Path = ".") -> dict[str, str | bool] | None:
    """Commit of a working tree and whether files in it differ from it; ``None`` outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return {"commit": commit, "changed": bool(status)}


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
