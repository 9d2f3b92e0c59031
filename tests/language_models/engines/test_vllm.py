import os
import sys

import numpy as np
import pytest
import torch

from lightning_accel.errors import EngineError, MissingPackageError
from lightning_accel.language_models.engines.registry import check_installed, open_engine
from lightning_accel.language_models.engines.vllm import PYTHON, VllmEngine

for package in ("transformers", "compressed_tensors"):
    pytest.importorskip(package, reason="the extra `lm` is not installed")

from lightning_accel.language_models.formats.registry import FORMATS  # noqa: E402  # after the skip
from lightning_accel.language_models.lora import LoRA, add_lora_, save_adapter  # noqa: E402
from lightning_accel.language_models.shipped import reference_model  # noqa: E402
from tests.support.language import llama, tokenizer, tokens  # noqa: E402
from tests.support.shipped import tiny_shipped  # noqa: E402

PROMPT = tokens(1, 12)[0].tolist()


def test_the_interpreter_is_asked_for(monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(
        MissingPackageError, match="Engine `vllm` needs an interpreter with vLLM: set LIGHTNING_ACCEL_VLLM_PYTHON"
    ):
        check_installed("vllm")


def test_an_interpreter_without_vllm_is_an_error_in_one_line(monkeypatch, tmp_path):
    if os.environ.get(PYTHON) == sys.executable:
        pytest.skip("this interpreter has vLLM")
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(EngineError, match="vLLM failed: ModuleNotFoundError: No module named 'vllm'"):
        VllmEngine(tmp_path)


@pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no interpreter with vLLM")
def test_it_serves_the_trained_integers_and_an_adapter(tmp_path):

    model = llama()
    shipped = tiny_shipped(model=model)
    FORMATS["compressed-tensors"].write(shipped, tokenizer(), tmp_path / "compressed-tensors")
    reference = reference_model(shipped)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    scores = expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].numpy()
    with open_engine("vllm", tmp_path, context=64) as engine:
        np.testing.assert_allclose(engine.token_log_probabilities(PROMPT), scores, atol=0.05)
        top = engine.next_log_probabilities(PROMPT, 3)
        prompts = [row.tolist() for row in tokens(3, 10, seed=4)]
        assert engine.generate_all(prompts, 4) == [engine.generate(p, 4) for p in prompts]
    assert max(abs(value - float(expected[-1, token])) for token, value in top.items()) < 0.05
    add_lora_(model, LoRA(4, mode="apart"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.05)
        adapted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    save_adapter(model, tmp_path / "adapter")
    with open_engine("vllm", tmp_path, context=64, adapter=tmp_path / "adapter") as engine:
        live = engine.next_log_probabilities(PROMPT, 3)
    assert max(abs(value - float(adapted[token])) for token, value in live.items()) < 0.1
    assert max(abs(value - float(expected[-1, token])) for token, value in live.items()) > 0.2
