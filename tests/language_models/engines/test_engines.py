import numpy as np
import pytest
import torch

from lightning_accel.errors import InvalidArgumentError, MissingPackageError
from lightning_accel.language_models.engines import registry
from lightning_accel.language_models.engines.base import log_softmax
from lightning_accel.language_models.engines.registry import TEXT_ENGINES, check_installed, engine_entry, open_engine

for package in ("transformers", "gguf", "compressed_tensors", "onnxruntime_genai"):
    pytest.importorskip(package, reason="the extra `lm` is not installed")

from lightning_accel.language_models.shipped import reference_model  # noqa: E402  # after the skip
from tests.support.language import tokenizer, tokens  # noqa: E402

HERE = [name for name in TEXT_ENGINES if name != "vllm"]  # tests/language_models/engines/test_vllm.py
PROMPT = tokens(1, 12)[0].tolist()


@pytest.fixture
def bundle(written):
    return written[0], reference_model(written[1])


def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def margin(model, tokens_):
    """Difference of the two largest logits of the next token."""
    with torch.no_grad():
        first, second = model(torch.tensor([list(tokens_)])).logits[0, -1].topk(2).values
    return float(first - second)


@pytest.mark.parametrize("name", HERE)
def test_it_generates_what_the_trained_network_does(name, bundle):
    pytest.importorskip(engine_entry(name).package, reason="not installed")
    folder, model = bundle
    seen = []
    with open_engine(name, folder, context=64) as engine:
        found = engine.generate(PROMPT, 12, seen.append)
        again = engine.generate(PROMPT, 12)
        with pytest.raises(
            InvalidArgumentError, match="must leave room for 60 new tokens in the context of 64, but got 12"
        ):
            engine.generate(PROMPT, 60)
        with pytest.raises(InvalidArgumentError, match="`prompt` must have a token"):
            engine.generate([], 1)
    expected = greedy(model, PROMPT, 12)
    assert seen == found == again
    differs = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
    # int8 activations may decide a near tie otherwise; the tokens before and a clear choice must agree
    assert differs is None or margin(model, PROMPT + expected[:differs]) < 0.5
    assert differs is None or name in ("llama.cpp", "openvino-genai", "onnxruntime-genai")


@pytest.mark.parametrize(("name", "error"), [("transformers", 0.0), ("onnxruntime-genai", 0.5)])
def test_logits_of_all_positions(name, error, bundle):
    folder, model = bundle
    with open_engine(name, folder) as engine:
        found = engine.logits(PROMPT)
        top = engine.next_log_probabilities(PROMPT, 3)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    assert found.shape == expected.shape == (12, 320)
    assert np.abs(found - expected).max() <= error
    assert list(top) == np.argsort(found[-1])[::-1][:3].tolist()
    assert top[int(found[-1].argmax())] == pytest.approx(float(log_softmax(found[-1]).max()))


@pytest.mark.parametrize("name", HERE)
def test_several_prompts_at_once_are_single_ones(name, bundle):
    pytest.importorskip(engine_entry(name).package, reason="not installed")
    folder, _ = bundle
    prompts = [row.tolist() for row in tokens(3, 10, seed=4)]
    with open_engine(name, folder, context=64) as engine:
        assert engine.generate_all(prompts, 5) == [engine.generate(prompt, 5) for prompt in prompts]


def test_llama_cpp_tokenizes_and_renders_like_the_tokenizer(bundle):
    pytest.importorskip("xllamacpp", reason="the extra `lm-engines` is not installed")
    folder, model = bundle
    text = "The import statement, e.g. `import os`:\n\n  two  spaces, 123456, naïve"
    messages = [{"role": "user", "content": "What is it?"}]
    with open_engine("llama.cpp", folder, cache="q8_0") as engine:
        assert engine.encode(text) == tokenizer()(text)["input_ids"]
        assert engine.render(messages) == tokenizer().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        found = engine.next_log_probabilities(PROMPT, 5)
        scores = engine.token_log_probabilities(PROMPT)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        every = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(scores, every.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0], atol=0.6)
    assert len(found) == 5
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < 0.5


def test_unknown_and_missing_engines_are_named(monkeypatch):
    with pytest.raises(InvalidArgumentError, match=r"`engines` must hold some of .*, but got 'tgi'"):
        engine_entry("tgi")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r'needs the package `xllamacpp`.*pip install "lightning-accel\[lm-engines\]"'
    ):
        check_installed("llama.cpp")
