"""Map the layers in TensorRT's inspector to the modules that they come from."""

import json
import re
from collections.abc import Sequence
from typing import Any

_NODE = re.compile(r"([A-Za-z_][\w.]*)/(node_\w+)")  # `body.0.conv/node_Conv_12`, as exported files name their nodes


def describe_layers(text: str, sparse: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Describe the layers of an engine.

    Args:
        text: the inspector's JSON; its details depend on how the engine was built.
        sparse: names of nodes with 2:4 sparse weights.

    Returns:
        For each layer: ``name``, ``modules`` (paths of the modules that were fused into it), ``precision`` (of its first
        output), ``kernel`` (name of the tactic), ``sparse`` (``None`` without 2:4 sparse weights, otherwise whether the
        kernel's name marks it as sparse). Unknown values are ``""``.
    """
    layers = json.loads(text).get("Layers", [])
    return [_described(layer, set(sparse)) for layer in layers]


def _described(layer: Any, sparse: set[str]) -> dict[str, Any]:
    if isinstance(layer, str):  # an engine without details has names only
        layer = {"Name": layer}
    name = str(layer.get("Name", ""))
    nodes = _NODE.findall(f"{name} {layer.get('Metadata', '')}")
    outputs = layer.get("Outputs") or [{}]
    kernel = str(layer.get("TacticName", ""))
    here = any(f"{module}/{node}" in sparse for module, node in nodes)
    return {
        "name": name,
        "modules": list(dict.fromkeys(module for module, _ in nodes)),
        "precision": str(outputs[0].get("Format/Datatype", "")),
        "kernel": kernel,
        "sparse": ("sparse" in kernel.lower() or "spgemm" in kernel.lower()) if here else None,
    }
