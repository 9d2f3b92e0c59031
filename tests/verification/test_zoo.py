"""Networks of the kinds that people deploy: exported right, without a false alarm, and built into engines."""

import pytest

from experiments.engine_zoo import LIMIT, TRANSFORMER_LIMIT, TRANSFORMERS, results
from tests.support.zoo import ZOO

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")


@pytest.mark.parametrize("name", ZOO)
def test_export_proof_and_engine(tmp_path, name):
    (result,) = results(name, tmp_path, ("fp32",))
    assert result.failure == ""
    assert result.error <= (TRANSFORMER_LIMIT if name in TRANSFORMERS else LIMIT)
    assert result.engine > 10_000
    compared, of = result.nodes.split(" of ")
    assert int(compared) >= 0.9 * int(of)


@pytest.mark.parametrize(
    "name", ["mlp", "unet", "bert"]
)  # all of them, and all precisions: python -m experiments.engine_zoo
def test_int8_with_the_rest_in_fp16(tmp_path, name):
    (result,) = results(name, tmp_path, ("int8",))
    assert result.failure == ""
    assert result.engine > 10_000
