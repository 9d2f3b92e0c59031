"""Read and write requests of the Open Inference Protocol v2 over HTTP, in JSON and with binary tensors.

The protocol: https://github.com/kserve/open-inference-protocol; binary tensors: Triton's extension of it,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError

BINARY_HEADER = "Inference-Header-Content-Length"
DATATYPES = {
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    **{f"{kind.upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True)
class InferRequest:
    """A request whose tensors fit the network.

    Args:
        feeds: inputs by name.
        outputs: names of the outputs to return.
        binary: names of those to return as binary.
        id: given by the client; empty: none.
    """

    feeds: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    binary: frozenset[str]
    id: str = ""

    @property
    def rows(self) -> int:
        """Size of the batch."""
        first = next(iter(self.feeds.values()))
        return len(first) if first.ndim else 1


def read_request(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    finite: bool = True,
) -> InferRequest:
    """Read a request and hold its tensors against the network's inputs.

    Args:
        body: JSON, followed by the binary tensors, if there are any.
        header_length: value of :data:`BINARY_HEADER`: bytes of the JSON part.
        inputs: of the network.
        outputs: of the network.
        finite: whether NaN and infinite numbers are refused.

    Raises:
        InvalidArgumentError: no such request, or tensors that don't fit; the message names the field.
    """
    header, rest = _split(body, header_length)
    request = _parsed(header)
    specs = {spec.name: spec for spec in inputs}
    feeds: dict[str, np.ndarray] = {}
    for entry in _entries(request, "inputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name not in specs:
            raise InvalidArgumentError(f"Field `inputs` must name the inputs {list(specs)}, but got {name!r}.")
        if name in feeds:
            raise InvalidArgumentError(f"Field `inputs` must hold each input once, but got {name!r} twice.")
        feeds[name], rest = _tensor(entry, specs[name], rest)
        specs[name].check(feeds[name])
        if finite and feeds[name].dtype.kind == "f" and not np.isfinite(feeds[name]).all():
            raise InvalidArgumentError(f"Input `{name}` must hold finite numbers, but got NaN or infinity.")
    if missing := [name for name in specs if name not in feeds]:
        raise InvalidArgumentError(f"Field `inputs` must hold the inputs {list(specs)}, but got none for {missing}.")
    if rest:
        raise InvalidArgumentError(
            f"The body must end after its binary tensors, but got {len(rest)} bytes more than their sizes say."
        )
    _check_batch(feeds)
    wanted, binary = _wanted(request, [spec.name for spec in outputs])
    identifier = request.get("id", "")
    if not isinstance(identifier, str):
        raise InvalidArgumentError(f"Field `id` must be a string, but got {identifier!r}.")
    return InferRequest(feeds, wanted, binary, identifier)


def write_response(
    request: InferRequest, results: Mapping[str, np.ndarray], model: str, version: str
) -> tuple[bytes, str | None]:
    """The body of a response, and the value of :data:`BINARY_HEADER`; ``None`` if it is JSON alone.

    Numbers in JSON are read back the same, bit for bit; NaN and infinity, which JSON doesn't have, become strings.
    """
    entries, blobs = [], []
    for name in request.outputs:
        array = np.ascontiguousarray(results[name])
        entry: dict[str, Any] = {"name": name, "datatype": _NAMES[str(array.dtype)], "shape": list(array.shape)}
        if name in request.binary:
            blobs.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = _plain(array)
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request.id:
        answer["id"] = request.id
    header = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    return header + b"".join(blobs), str(len(header)) if blobs else None


def describe(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors of a network as its metadata: -1 is a dimension that may change."""
    return [
        {
            "name": spec.name,
            "datatype": _NAMES[str(spec.dtype)],
            "shape": [-1 if size is None else size for size in spec.shape],
        }
        for spec in specs
    ]


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not header_length.isascii() or not header_length.isdigit() or int(header_length) > len(body):
        raise InvalidArgumentError(
            f"Header `{BINARY_HEADER}` must be the length of the JSON part, at most {len(body)}, but got {header_length!r}."
        )
    return body[: int(header_length)], body[int(header_length) :]


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        request = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"The body must be JSON, but it can't be read: {error}.") from None
    if not isinstance(request, dict):
        raise InvalidArgumentError(f"The body must be a JSON object, but got {type(request).__name__}.")
    return request


def _entries(request: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    entries = request.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidArgumentError(f"Field `{field}` must be a list of objects, but got {type(entries).__name__}.")
    return entries


def _parameters(of: Mapping[str, Any]) -> Mapping[str, Any]:
    found = of.get("parameters", {})
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"Field `parameters` must be an object, but got {type(found).__name__}.")
    return found


def _tensor(entry: Mapping[str, Any], spec: TensorSpec, rest: bytes) -> tuple[np.ndarray, bytes]:
    """The tensor of an entry, and the binary bytes after it."""
    shape, datatype = entry.get("shape"), entry.get("datatype")
    if datatype != _NAMES[str(spec.dtype)]:
        raise InvalidArgumentError(
            f"Input `{spec.name}` must have the datatype {_NAMES[str(spec.dtype)]}, but got {datatype!r}. Nothing is cast."
        )
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise InvalidArgumentError(f"Input `{spec.name}` must have a shape of integers from 0, but got {shape!r}.")
    count = math.prod(shape)
    size = _parameters(entry).get("binary_data_size")
    if size is not None:
        expected = count * spec.dtype.itemsize
        if type(size) is not int or size != expected or len(rest) < expected or "data" in entry:
            raise InvalidArgumentError(
                f"Input `{spec.name}` must have `binary_data_size` {expected} for shape {shape}, so many bytes after the JSON part, and "
                f"no `data`, but got {size!r} and {len(rest)} bytes."
            )
        array = np.frombuffer(rest[:expected], spec.dtype.newbyteorder("<")).astype(spec.dtype, copy=False)
        return array.reshape(shape), rest[expected:]
    return from_json(entry.get("data"), spec, shape), rest


def from_json(data: Any, spec: TensorSpec, shape: list[int]) -> np.ndarray:
    """Numbers of a JSON list as an array of an input.

    Args:
        data: nested lists, or a flat one.
        spec: of the input.
        shape: of the array.

    Raises:
        InvalidArgumentError: no list, or one of other lengths, of other values, or of numbers that the input's type doesn't hold.
    """
    count = math.prod(shape)
    if not isinstance(data, list):
        raise InvalidArgumentError(f"Input `{spec.name}` must have `data` as a list, but got {type(data).__name__}.")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(f"Input `{spec.name}` must have `data` of equally long lists of numbers.") from None
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[spec.dtype.kind]
    if array.size and array.dtype.kind not in allowed:
        raise InvalidArgumentError(
            f"Input `{spec.name}` must have `data` of {_NAMES[str(spec.dtype)]} numbers, but got {array.dtype} values."
        )
    if array.size != count:
        raise InvalidArgumentError(
            f"Input `{spec.name}` must have {count} numbers in `data` for shape {shape}, but got {array.size}."
        )
    if array.size and spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidArgumentError(
                f"Input `{spec.name}` must have `data` from {limits.min} to {limits.max}, but got {array.min()} to {array.max()}."
            )
    with np.errstate(over="ignore"):  # numbers too large for the type become infinite, and are refused as such
        return array.astype(spec.dtype).reshape(shape)


def _check_batch(feeds: Mapping[str, np.ndarray]) -> None:
    sizes = {name: array.shape[0] for name, array in feeds.items() if array.ndim}
    if len(set(sizes.values())) > 1:
        raise InvalidArgumentError(f"Field `inputs` must hold one batch size, but got {sizes}.")
    if 0 in sizes.values():
        raise InvalidArgumentError("Field `inputs` must hold at least one row, but got a batch of 0.")


def _wanted(request: Mapping[str, Any], known: list[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Outputs to return, and which of them as binary."""
    everything = _parameters(request).get("binary_data_output", False)
    if "outputs" not in request:
        return tuple(known), frozenset(known if everything is True else ())
    wanted: dict[str, bool] = {}
    for entry in _entries(request, "outputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name not in known or name in wanted:
            raise InvalidArgumentError(f"Field `outputs` must name outputs of {known}, each once, but got {name!r}.")
        wanted[name] = _parameters(entry).get("binary_data", everything) is True
    return tuple(wanted) or tuple(known), frozenset(name for name, binary in wanted.items() if binary)


def _plain(array: np.ndarray) -> list[Any]:
    flat: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        flat = [value if math.isfinite(value) else str(value) for value in flat]
    return flat
