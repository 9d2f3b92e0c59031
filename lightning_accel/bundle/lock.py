"""Keep two runs on one machine from writing one bundle."""

import hashlib
import os
import tempfile
from pathlib import Path

from lightning_accel.errors import InvalidArgumentError

_HELD: dict[str, tuple[int, int]] = {}  # path of the bundle -> owner, file descriptor


def lock(dirpath: str | Path, owner: int) -> None:
    """Reserve a bundle's folder until :func:`unlock` or the end of the process; a second call of the owner does nothing.

    The lock is a file in the folder for temporary files, locked by the operating system. Runs on other machines that share the folder
    aren't seen.

    Args:
        dirpath: the bundle.
        owner: who writes it, e.g. the ``id`` of the callback.

    Raises:
        InvalidArgumentError: another run, or another callback of this one, writes this bundle.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = str(Path(dirpath).resolve())
    if path in _HELD and _HELD[path][0] == owner:
        return
    name = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    file = Path(tempfile.gettempdir()) / f"lightning-accel-{os.getuid()}-{name}.lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        writer = os.pread(descriptor, 32, 0).decode() or "unknown"
        os.close(descriptor)
        whose = "another ModelExport of this run" if writer == str(os.getpid()) else f"the run of process {writer}"
        raise InvalidArgumentError(
            f"Argument `dirpath` must be a bundle that no other run writes, but got {str(dirpath)!r}, which {whose} is about to write. "
            "Choose another path, or wait."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _HELD[path] = owner, descriptor


def unlock(dirpath: str | Path, owner: int) -> None:
    """Release a bundle's folder if the owner holds it."""
    path = str(Path(dirpath).resolve())
    if _HELD.get(path, (None,))[0] == owner:
        os.close(_HELD.pop(path)[1])  # which releases the lock; the file stays, as removing it would race with others
