import json

import pytest

import lightning_accel as la
from lightning_accel.cli.main import main

for package in ("transformers", "compressed_tensors", "peft"):
    pytest.importorskip(package, reason="the extra `lm` is not installed")

from lightning_accel.language_models.lora import LoRA, add_lora_  # noqa: E402  # after the skip
from tests.support.language import llama, tokenizer, tokens  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("generate") / "bundle", llama()
    la.quantization.quantize_weights_(model, "int4", exclude="lm_head")
    add_lora_(model, LoRA(4, mode="apart"))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.3)
    la.language_models.write_language_bundle(
        model, folder, tokenizer(), tokens(2), formats=[], engines=["transformers"], new_tokens=2
    )
    return folder


def run(capsys, *arguments):
    code = main(["generate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_it_prints_the_answer_of_the_engine(bundle, capsys):
    code, out, _ = run(capsys, bundle, "--prompt", "The import statement", "--tokens", 8)
    with la.language_models.open_bundle(bundle) as engine:
        answer = engine.generate(tokenizer()("The import statement")["input_ids"], 8)
    stop = answer.index(1) if 1 in answer else 8
    assert (code, out) == (0, tokenizer().decode(answer[:stop], skip_special_tokens=True) + "\n")
    _, chat, _ = run(capsys, bundle, "--prompt", "The import statement", "--tokens", 8, "--chat")
    _, adapted, _ = run(capsys, bundle, "--prompt", "The import statement", "--tokens", 8, "--adapter", "default")
    assert len({out, chat, adapted}) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "a", "--tokens", 0), "`--tokens` must be at least 1"),
        (("--prompt", "a", "--tokens", 500), "must leave room for 500 new tokens in the context of 128"),
        (("--prompt", "", "--tokens", 5), "`prompt` must have a token"),
        (("--prompt", "a", "--engine", "vllm"), "must be one of the bundle's ['transformers'], but got 'vllm'"),
        (("--prompt", "a", "--adapter", "other"), "must be one of the bundle's adapters ['default'], but got 'other'"),
    ],
)
def test_mistakes_are_one_line(bundle, capsys, arguments, says):
    code, out, error = run(capsys, bundle, *arguments)
    assert (code, out) == (1, "")
    assert says in error
    assert error.count("\n") == 1


def test_a_bundle_of_another_kind_is_refused(tmp_path, capsys):
    from lightning_accel.bundle.writer import write_manifest

    write_manifest(tmp_path, {"engines": {}})
    code, _, error = run(capsys, tmp_path, "--prompt", "a")
    assert code == 1
    assert "must be one of LanguageModelExport" in error


def test_benchmark_measures_each_engine_and_a_null_run(bundle, capsys, tmp_path):
    out = tmp_path / "speed.json"
    assert main(["benchmark", str(bundle), "--seconds", "0.1", "--callers", "1,2", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| engine | first token, ms | tokens/s, 1 at once | tokens/s, 2 at once | memory, MB | perplexity |" in text
    assert "Fastest of the proven engines: transformers for 1 at once, transformers for 2 at once." in text
    found = json.loads(out.read_text())
    assert [one["engine"] for one in found["engines"]] == ["transformers", "transformers (again)"]
    assert found["failed"] == {}
    for one in found["engines"]:
        assert one["memory_mb"] > 50
        assert all(rate > 0 for rate in one["tokens_per_s"].values())
        assert one["rounds"] >= 3
    assert set(found["null"]) == {"1", "2"}
    assert main(["benchmark", str(bundle), "--all"]) == 1
    assert "`--all` must be left out with a language model" in capsys.readouterr().err
