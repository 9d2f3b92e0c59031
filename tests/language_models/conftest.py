"""A tiny quantized Llama, written in every format once for all tests."""

import pytest


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Folder with one folder per format, and what was written."""
    for package in ("transformers", "gguf", "compressed_tensors", "onnxruntime_genai"):
        pytest.importorskip(package, reason="the extra `lm` is not installed")
    from lightning_accel.language_models.formats.registry import FORMATS
    from tests.support.language import tokenizer
    from tests.support.shipped import tiny_shipped

    folder, shipped = tmp_path_factory.mktemp("written"), tiny_shipped()
    for name, one in FORMATS.items():
        assert one.refuses(shipped) == ""
        one.write(shipped, tokenizer(), folder / name)
    return folder, shipped
