import json

import numpy as np
import pytest

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError, LightningAccelError
from lightning_accel.serving.protocol import BINARY_HEADER, DATATYPES, describe, read_request, write_response

X = TensorSpec("x", np.dtype("float32"), (None, 2))
N = TensorSpec("n", np.dtype("int8"), (None,))
Y = TensorSpec("y", np.dtype("float32"), (None, 2))
Z = TensorSpec("z", np.dtype("bool"), (None,))


def body(*entries, **fields):
    return json.dumps({"inputs": list(entries), **fields}).encode()


def entry(spec, array):
    names = {dtype: name for name, dtype in DATATYPES.items()}
    return {
        "name": spec.name,
        "datatype": names[str(spec.dtype)],
        "shape": list(np.shape(array)),
        "data": np.asarray(array).tolist(),
    }


def test_two_inputs_one_binary_and_the_outputs_that_were_asked_for():
    x = np.array([[0.1, -0.0], [1e-45, 3e38]], np.float32)
    binary = {"name": "x", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}}
    head = body(entry(N, [-128, 127]), binary, outputs=[{"name": "z"}])
    asked = read_request(head + x.tobytes(), str(len(head)), [X, N], [Y, Z])
    assert asked.feeds["x"].tobytes() == x.tobytes()
    assert asked.feeds["n"].tolist() == [-128, 127]
    assert asked.rows == 2
    assert asked.outputs == ("z",)
    content, header = write_response(asked, {"y": x, "z": np.array([True, False])}, "m", "3")
    assert header is None
    assert json.loads(content) == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [{"name": "z", "datatype": "BOOL", "shape": [2], "data": [True, False]}],
    }


@pytest.mark.parametrize("dtype", sorted(DATATYPES.values()))
@pytest.mark.parametrize("binary", [False, True])
def test_every_type_keeps_its_bits(dtype, binary):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(5, 2)) * 3
    array = (array > 0 if dtype == "bool" else np.abs(array) if dtype.startswith("u") else array).astype(dtype)
    spec = TensorSpec("x", np.dtype(dtype), (None, 2))
    asked = read_request(body(entry(spec, array), parameters={"binary_data_output": binary}), None, [spec], [spec])
    assert asked.feeds["x"].dtype == array.dtype
    assert asked.feeds["x"].tobytes() == array.tobytes()
    content, header = write_response(asked, {"x": array}, "m", "1")
    if binary:
        assert content[int(header) :] == array.tobytes()
    else:
        (got,) = json.loads(content)["outputs"]
        assert np.array(got["data"], dtype).tobytes() == array.tobytes()
    assert describe([spec])[0]["shape"] == [-1, 2]


def test_numbers_that_json_does_not_have():
    asked = read_request(body(entry(X, [[1.0, 2.0]])), None, [X], [Y])
    content, _ = write_response(asked, {"y": np.array([[np.nan, -np.inf]], np.float32)}, "m", "1")
    assert json.loads(content)["outputs"][0]["data"] == ["nan", "-inf"]
    nan = body(entry(X, [[1.0, np.nan]]))
    assert np.isnan(read_request(nan, None, [X], [Y], finite=False).feeds["x"][0, 1])
    with pytest.raises(InvalidArgumentError, match="must hold finite numbers"):
        read_request(nan, None, [X], [Y])


GOOD = entry(X, [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("content", "header", "text"),
    [
        (body(GOOD, GOOD), None, "must hold each input once, but got 'x' twice"),
        (body(GOOD, entry(N, [1])), None, "must name the inputs ['x'], but got 'n'"),
        (body(GOOD), "x", f"Header `{BINARY_HEADER}` must be the length"),
        (body(GOOD), "-1", f"Header `{BINARY_HEADER}` must be the length"),
        (body(GOOD), "999", f"Header `{BINARY_HEADER}` must be the length"),
        (body(GOOD) + b"1234", str(len(body(GOOD))), "must end after its binary tensors, but got 4 bytes more"),
        (body(GOOD, id=3), None, "Field `id` must be a string, but got 3"),
        (body(GOOD, outputs=[{"name": "w"}]), None, "must name outputs of ['y'], each once, but got 'w'"),
        (
            body(GOOD, outputs=[{"name": "y"}, {"name": "y"}]),
            None,
            "must name outputs of ['y'], each once, but got 'y'",
        ),
        (body({**GOOD, "shape": [True, 2]}), None, "must have a shape of integers from 0"),
        (body({**GOOD, "shape": [10**12, 2]}), None, "must have a shape of integers from 0"),
        (body({**GOOD, "shape": [2**30, 2**30]}), None, "numbers in `data` for shape"),
        (body({**GOOD, "name": ["x"]}), None, "must name the inputs"),
    ],
)
def test_refusals(content, header, text):
    with pytest.raises(InvalidArgumentError) as error:
        read_request(content, header, [X], [Y])
    assert text in str(error.value)


def test_integers_are_not_wrapped_and_batches_are_of_one_size():
    with pytest.raises(InvalidArgumentError, match="must have `data` from -128 to 127, but got 300 to 300"):
        read_request(body(entry(N, [300])), None, [N], [Y])
    with pytest.raises(InvalidArgumentError, match="must have `data` of INT8 numbers, but got float64 values"):
        read_request(body({**entry(N, [1]), "data": [1.5]}), None, [N], [Y])
    with pytest.raises(InvalidArgumentError, match="must hold one batch size, but got"):
        read_request(body(GOOD, entry(N, [1, 2])), None, [X, N], [Y])


def test_whatever_comes_only_refusals_come_out():
    rng = np.random.default_rng(0)
    whole = body(GOOD, outputs=[{"name": "y"}], id="a", parameters={"binary_data_output": True})
    values = [None, True, -1, 2**70, 1e400, "x", [], {}, [[]], [{}], {"name": []}]
    for _ in range(2000):
        request = json.loads(whole)
        at = rng.choice(["inputs", "outputs", "id", "parameters", "entry", "bytes"])
        value = values[rng.integers(len(values))]
        if at == "entry":
            request["inputs"][0][rng.choice(["name", "shape", "datatype", "data", "parameters"])] = value
        elif at != "bytes":
            request[at] = value
        content = json.dumps(request).encode()
        if at == "bytes":
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            content = bytes(damaged)
        asked = refused = None
        try:
            asked = read_request(content, None, [X], [Y])
        except LightningAccelError as error:
            refused = str(error)
        assert "\n" not in refused if refused else asked.feeds["x"].shape[1] == 2
