import json
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError, MissingPackageError, RunError, VerificationError

for package in ("transformers", "gguf", "compressed_tensors", "onnxruntime_genai", "peft"):
    pytest.importorskip(package, reason="the extra `lm` is not installed")

from lightning_accel.language_models import bundle as bundles  # noqa: E402  # after the skip
from lightning_accel.language_models.causal_lm import CausalLM  # noqa: E402
from lightning_accel.language_models.export import LanguageModelExport  # noqa: E402
from lightning_accel.language_models.formats.registry import FORMATS  # noqa: E402
from lightning_accel.language_models.lora import LoRA  # noqa: E402
from lightning_accel.language_models.opening import open_bundle  # noqa: E402
from lightning_accel.language_models.token_data import TokenSequences  # noqa: E402
from tests.support.language import llama, tokenizer, tokens, trainer  # noqa: E402


def loader(count=16):
    return DataLoader(TokenSequences(input_ids=tokens(count, 32)), 4)


def qat(start=0):
    return la.QuantizationAwareTraining(target="int4", group=32, exclude=["lm_head"], start=start)


def fit(tmp_path, module, callbacks, settings):
    export = LanguageModelExport(tmp_path / "bundle", settings.pop("tokenizer", tokenizer()), **settings)
    ship(tmp_path, module or CausalLM(llama()), export, *callbacks)


def ship(tmp_path, module, export, *callbacks, epochs=1):
    trainer(tmp_path, epochs, *(callbacks or (qat(),)), export).fit(module, loader(), loader(4))


def test_one_fit_ships_to_every_engine(tmp_path):
    pytest.importorskip("xllamacpp", reason="the extra `lm-engines` is not installed")
    pytest.importorskip("openvino_genai", reason="the extra `lm-engines` is not installed")
    engines = ["transformers", "onnxruntime-genai", "llama.cpp", "openvino-genai"]
    module, folder = CausalLM(llama(initializer_range=0.05), LoRA(4), lr=3e-3), tmp_path / "bundle"
    export = LanguageModelExport(folder, tokenizer(), ["gptq"], engines, new_tokens=6)
    ship(tmp_path, module, export, epochs=2)
    report = json.loads((folder / "report.json").read_text())
    assert report["failed"] == {}
    assert list(report["formats"]) == ["gptq", "compressed-tensors", "onnx-genai", "gguf"]
    assert all(one["equal"] == one["integers"] > 0 and one["scales_equal"] for one in report["formats"].values())
    assert report["formats"]["onnx-genai"]["float_error"] < 1e-5
    assert report["engines"]["transformers"]["logit_error"] == 0.0
    assert report["engines"]["transformers"]["perplexity"] == pytest.approx(
        report["engines"]["transformers"]["reference_perplexity"], rel=1e-6
    )
    assert report["engines"]["llama.cpp"]["tokenizer_equal"]
    assert all(one["batched_equal"] for one in report["engines"].values())
    assert report["environment"]["packages"]["xllamacpp"]
    text = (folder / "report.md").read_text()
    assert "| transformers | compressed-tensors | 0 |" in text
    assert "<table>" in (folder / "report.html").read_text()
    with torch.no_grad():
        expected = module.eval()(tokens(1, 12))[0]
    with open_bundle(folder) as engine:
        assert engine.name == "transformers"
        assert torch.equal(torch.from_numpy(engine.logits(tokens(1, 12)[0].tolist())), expected)
    (folder / "gguf" / "model.gguf").write_bytes(b"damaged")
    with pytest.raises(InvalidArgumentError, match=r"`gguf/model\.gguf` must have the SHA-256"):
        open_bundle(folder)
    with pytest.raises(InvalidArgumentError, match=r"Argument `path` must be .*open_bundle"):
        la.load_runner(folder)


def test_an_adapter_kept_apart_is_shown_to_be_live(tmp_path):
    module, folder = CausalLM(llama(), LoRA(4, mode="apart"), lr=3e-2), tmp_path / "bundle"
    ship(tmp_path, module, LanguageModelExport(folder, tokenizer(), engines="transformers", new_tokens=4), epochs=3)
    report = json.loads((folder / "report.json").read_text())
    proof = report["engines"]["transformers"]
    assert proof["adapter_error"] < 1e-4 < 0.1 < proof["adapter_effect"]
    assert report["adapters"] == ["default"]
    assert (folder / "adapters" / "default" / "adapter_model.safetensors").is_file()
    assert "adapters/default/adapter_model.safetensors" in json.loads((folder / "manifest.json").read_text())["files"]
    with torch.no_grad():
        expected = module.eval()(tokens(1, 12))[0]
    with open_bundle(folder, adapter=folder / "adapters" / "default") as engine:
        found = torch.from_numpy(engine.logits(tokens(1, 12)[0].tolist()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_with_other_integers_fails_the_run_and_writes_nothing(tmp_path, monkeypatch):
    write = FORMATS["gguf"].write

    def another(shipped, tokenizer, folder):
        name = next(iter(shipped.integers))
        integers, scales = shipped.integers[name]
        changed = integers.clone()
        changed[0, 0] = 7 if changed[0, 0] != 7 else 6
        shipped.integers[name] = (changed, scales)
        write(shipped, tokenizer, folder)
        shipped.integers[name] = (integers, scales)

    monkeypatch.setitem(bundles.format_named.__globals__["FORMATS"], "gguf", type(FORMATS["gguf"])(
        **{**vars(FORMATS["gguf"]), "write": another}
    ))  # fmt: skip
    export = LanguageModelExport(tmp_path / "bundle", tokenizer(), "gguf", new_tokens=2)
    with pytest.raises(VerificationError, match=r"`gguf` must hold the trained integers, but 1 of .* integers differ"):
        ship(tmp_path, CausalLM(llama()), export)
    assert not (tmp_path / "bundle").exists()
    assert (tmp_path / "bundle.ckpt").is_file()


def test_an_engine_that_fails_is_named_and_the_others_ship(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ACCEL_VLLM_PYTHON", "/bin/false")
    export = LanguageModelExport(tmp_path / "bundle", tokenizer(), engines=["vllm", "transformers"], new_tokens=2)
    ship(tmp_path, CausalLM(llama()), export)
    assert list(export.report["engines"]) == ["transformers"]
    assert "vLLM must answer, but ended with exit code 1" in export.report["failed"]["vllm"]["reason"]
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["default"]["engine"]) == (False, "transformers")
    with pytest.raises(InvalidArgumentError, match=r"must be one of the bundle's .*, but got 'vllm': vLLM must answer"):
        open_bundle(tmp_path / "bundle", "vllm")
    strict = LanguageModelExport(
        tmp_path / "b", tokenizer(), engines=["vllm", "transformers"], new_tokens=2, strict=True
    )
    with pytest.raises(VerificationError, match="Every engine must compute the trained network, but vllm: "):
        ship(tmp_path, CausalLM(llama()), strict)
    alone = LanguageModelExport(tmp_path / "c", tokenizer(), engines=["vllm"], new_tokens=2)
    with pytest.raises(VerificationError, match="An engine must compute the trained network, but none does: vllm: "):
        ship(tmp_path, CausalLM(llama()), alone)


def test_what_cannot_ship_is_refused_before_training(tmp_path, monkeypatch):
    def refused(error, match, module=None, callbacks=(), **kwargs):
        settings = {"engines": "transformers", **kwargs}
        with pytest.raises(error, match=match):
            fit(tmp_path, module, callbacks, settings)

    refused(InvalidArgumentError, "`engines` must hold some of", engines="sglang")
    refused(InvalidArgumentError, "`formats` must hold some of", formats="awq")
    refused(InvalidArgumentError, "must name what to write, but got neither", engines=None)
    refused(InvalidArgumentError, "`new_tokens` must be at least 1", new_tokens=0)
    refused(InvalidArgumentError, "must have at most the model's 300 tokens", CausalLM(llama(vocabulary=300)))
    refused(InvalidArgumentError, "`tokenizer` must be a fast tokenizer", tokenizer=object())
    eight = (la.QuantizationAwareTraining(target="int8-weights", start=0),)
    refused(InvalidArgumentError, "'onnx-genai': its builder quantizes to 4 bits", None, eight, formats="onnx-genai")
    part = (la.QuantizationAwareTraining(target="int4", start=0, exclude=["lm_head", "o_proj"]),)
    refused(InvalidArgumentError, r"`model\.layers\.0\.self_attn\.o_proj` is float", None, part, formats="onnx-genai")
    if find_spec("openvino_genai"):
        idle = (la.WeightPruning(sparsity=0.1),)
        refused(
            InvalidArgumentError, "'openvino-genai', which reads no float32 GGUF", None, idle, engines="openvino-genai"
        )
    monkeypatch.delenv("LIGHTNING_ACCEL_VLLM_PYTHON", raising=False)
    refused(MissingPackageError, "Engine `vllm` needs an interpreter", engines="vllm")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("")
    refused(InvalidArgumentError, "must be a new folder or an earlier bundle")


def test_a_run_without_held_out_tokens_is_refused(tmp_path):
    export = LanguageModelExport(tmp_path / "bundle", tokenizer(), engines="transformers")
    with pytest.raises(InvalidArgumentError, match="`held_out` must be token ids"):
        trainer(tmp_path, 1, qat(), export).fit(CausalLM(llama()), loader())
    given = LanguageModelExport(
        tmp_path / "bundle", tokenizer(), engines="transformers", held_out=tokens(2), new_tokens=2
    )
    trainer(tmp_path, 1, qat(), given).fit(CausalLM(llama()), loader())
    assert given.report["engines"]["transformers"]["agreement"] == 1.0


def test_a_run_that_did_not_reach_int4_does_not_ship(tmp_path):
    export = LanguageModelExport(tmp_path / "bundle", tokenizer(), engines="transformers", new_tokens=2)
    with pytest.raises(RunError, match=r"hasn't rounded weights yet: it starts at 2"):
        ship(tmp_path, CausalLM(llama()), export, qat(start=2), epochs=2)
