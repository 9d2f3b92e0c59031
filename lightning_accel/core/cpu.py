"""The CPU of this machine."""

import platform
from functools import cache
from pathlib import Path


@cache
def cpu_name() -> str:
    """Model name of this machine's CPU."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


@cache
def cpu_fields() -> dict[str, str]:
    """The fields of the first core in Linux's description; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
