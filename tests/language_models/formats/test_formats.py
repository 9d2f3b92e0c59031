import json
import shutil

import numpy as np
import pytest
import torch

from lightning_accel.errors import EngineError, InvalidArgumentError
from lightning_accel.language_models.formats.registry import FORMATS, format_named

pytest.importorskip("transformers", reason="the extra `lm` is not installed")
for package in ("gguf", "compressed_tensors", "onnxruntime_genai"):
    pytest.importorskip(package, reason="the extra `lm` is not installed")

from lightning_accel.language_models.formats import gguf as gguf_format  # noqa: E402  # after the skip
from lightning_accel.language_models.formats import onnx_genai  # noqa: E402
from lightning_accel.language_models.shipped import reference_model, shipped_model, write_tokenizer  # noqa: E402
from tests.support.language import llama, tokenizer, tokens  # noqa: E402
from tests.support.shipped import tiny_shipped  # noqa: E402


def qwen(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if kind == "Qwen3" else 16,  # transformers' reader of GGUF takes Qwen3's default
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture
def shipped(written):
    return written[1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_integer_and_scale_is_the_trained_one(name, written):
    folder, shipped = written
    assert (folder / name / FORMATS[name].file).is_file()
    found = FORMATS[name].read(folder / name, shipped)
    assert found.keys() == shipped.integers.keys()
    for layer, (integers, scales) in found.items():
        assert torch.equal(integers, shipped.integers[layer][0]), layer
        assert torch.equal(scales.float(), shipped.integers[layer][1].float()), layer


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # asks for float kernels of the same integers
def test_transformers_reads_compressed_tensors_bit_for_bit(shipped, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    FORMATS["compressed-tensors"].write(shipped, tokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    with torch.no_grad():
        found, expected = model(tokens(2)).logits, reference_model(shipped)(tokens(2)).logits
    assert torch.equal(found, expected)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer().chat_template
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize("target", ["int4", "int8-weights", None])
@pytest.mark.parametrize("make", [llama, lambda: qwen("Qwen2"), lambda: qwen("Qwen3")], ids=["llama", "qwen2", "qwen3"])
def test_gguf_holds_every_tensor(make, target, tmp_path):
    """transformers' own reader of GGUF, which knows the permutation of heads and the names, gets the trained network."""
    from transformers import AutoModelForCausalLM

    small = tiny_shipped(target, make())
    FORMATS["gguf"].write(small, tokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = model(tokens(2)).logits, reference_model(small)(tokens(2)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_stock_quantizer_of_gguf_writes_the_same_bytes(shipped, tmp_path):
    import gguf

    FORMATS["gguf"].write(shipped, tokenizer(), tmp_path)
    compared = 0
    for tensor in gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
            assert np.array_equal(gguf.quants.quantize(values, tensor.tensor_type), np.array(tensor.data))
            compared += 1
    assert compared == 14


def test_gguf_has_the_tokenizer_and_the_template(shipped, tmp_path):
    import gguf

    FORMATS["gguf"].write(shipped, tokenizer(), tmp_path)
    fields = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer().chat_template
    names = fields["tokenizer.ggml.tokens"].contents()
    assert [names[i] for i in (0, 1, 300)] == tokenizer().convert_ids_to_tokens([0, 1, 300])
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_pre_tokenizers_are_named():
    def stored(*steps):
        return {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}

    split, level = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}}, {"type": "ByteLevel"}
    assert gguf_format.pre_tokenizer(stored(split, level)) == "llama-bpe"
    assert gguf_format.pre_tokenizer(stored({"type": "Digits", "individual_digits": True}, level)) == "smollm"
    assert gguf_format.pre_tokenizer(stored({"type": "Split", "pattern": {"Regex": r"a|\p{N}| ?b"}}, level)) == "qwen2"
    assert gguf_format.pre_tokenizer(stored({"type": "Metaspace"})) == ""
    assert gguf_format.pre_tokenizer({"model": {"type": "Unigram"}}) == ""


def test_a_quantized_output_layer_is_written_too(tmp_path):
    small = tiny_shipped(exclude=None)
    assert "lm_head" in small.integers
    for name in ("compressed-tensors", "gguf"):
        FORMATS[name].write(small, tokenizer(), tmp_path / name)
        found = FORMATS[name].read(tmp_path / name, small)
        assert torch.equal(found["lm_head"][0], small.integers["lm_head"][0]), name


def test_a_tied_embedding_stays_float_in_onnx(tmp_path):
    """By default the builder quantizes an embedding that is also the output layer."""
    tied = tiny_shipped(model=llama(tied=True), exclude=None)
    assert "lm_head" not in tied.integers
    FORMATS["onnx-genai"].write(tied, tokenizer(), tmp_path)
    assert FORMATS["onnx-genai"].read(tmp_path, tied).keys() == tied.integers.keys()
    prompt = tokens(1, 12)
    with torch.no_grad():
        expected = reference_model(tied)(prompt).logits[0].numpy()
    found = onnx_genai.float_logits(tmp_path, prompt[0].tolist())
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)


def test_what_a_format_cannot_hold_is_said(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    reasons = {name: one.refuses for name, one in FORMATS.items()}
    eight = tiny_shipped("int8-weights")
    assert "4-bit integers only" in reasons["gptq"](eight)
    assert "4 bits" in reasons["onnx-genai"](eight)
    wide = tiny_shipped(model=llama(intermediate_size=192), group=64)
    assert "its blocks have 32 integers, and the group is 64" in reasons["gguf"](wide)
    part = tiny_shipped(exclude=["lm_head", "*.o_proj"])
    assert "`model.layers.0.self_attn.o_proj` is float" in reasons["onnx-genai"](part)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    conv = tiny_shipped(model=gpt2, exclude=None)
    for name in ("compressed-tensors", "gptq"):
        assert "is a Conv1D" in reasons[name](conv)
    assert "GPT2LMHeadModel has no writer here" in reasons["gguf"](conv)
    assert "GPT2LMHeadModel can't be compared here" in reasons["onnx-genai"](conv)
    with pytest.raises(InvalidArgumentError, match="`formats` must hold some of"):
        format_named("awq")


def test_a_failing_builder_is_one_line(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_genai.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="The builder of onnxruntime-genai failed for LlamaForCausalLM: no message"):
        FORMATS["onnx-genai"].write(shipped, tokenizer(), tmp_path / "out")


def test_the_tokenizer_is_hashed(tmp_path):
    digests = write_tokenizer(tokenizer(), tmp_path / "a")
    assert digests == write_tokenizer(tokenizer(), tmp_path / "b")
    assert "tokenizer.json" in digests
    shutil.rmtree(tmp_path / "b")


def test_layers_of_different_grids_are_refused():
    from lightning_accel.quantization.weight_only.ptq import quantize_weights_

    model = llama()
    quantize_weights_(model, "int4", exclude="lm_head")
    quantize_weights_(model, "int8-weights", include="lm_head")
    with pytest.raises(InvalidArgumentError, match="must have one grid for all layers"):
        shipped_model(model)


def test_a_network_loaded_from_a_quantized_file_ships_as_what_it_is_now(shipped, tmp_path):
    """transformers keeps the quantization of a GGUF file in the config, and onnxruntime-genai's builder refuses it."""
    from lightning_accel.language_models.loading import load_causal_lm

    FORMATS["gguf"].write(shipped, tokenizer(), tmp_path)
    again = tiny_shipped(model=load_causal_lm(tmp_path / "model.gguf"))
    assert "quantization_config" not in again.config
    assert all(torch.equal(again.integers[name][0], q) for name, (q, _) in shipped.integers.items())
