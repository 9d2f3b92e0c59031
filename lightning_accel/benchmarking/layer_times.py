"""Time of each layer of an ONNX file, by ONNX Runtime's own profiler."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.optional import require

_WARM, _CALLS = 3, 10


def layer_times(file: str | Path, feeds: Mapping[str, np.ndarray], threads: int) -> dict[str, Any]:
    """Profile calls of a file in ONNX Runtime on the CPU, optimized as it runs in production.

    The profiler costs time itself, so that the sum is larger than the latency of a call.

    Args:
        file: the ``.onnx`` file.
        feeds: inputs by name; the batch is their first dimension.
        threads: inside an operator.

    Returns:
        ``file``, ``calls``, ``total_ms`` of a call, and ``layers``, longest first: ``name``, ``kind``, ``ms`` (median over the calls)
        and ``share``. Operators that ONNX Runtime has fused count as one.
    """
    ort = require("onnxruntime", "runtime", "`layer_times`")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(_WARM + _CALLS):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            name = name.removesuffix("_kernel_time")
            spent.setdefault(name, []).append(event["dur"] / 1000)
            kinds[name] = str(event.get("args", {}).get("op_name", ""))
    medians = {name: float(np.median(times[-_CALLS:])) for name, times in spent.items()}
    total = sum(medians.values())
    layers = [
        {"name": name, "kind": kinds[name], "ms": round(ms, 6), "share": ms / total if total else 0.0}
        for name, ms in sorted(medians.items(), key=lambda item: -item[1])
    ]
    return {"file": Path(file).name, "calls": _CALLS, "threads": threads, "total_ms": round(total, 6), "layers": layers}
