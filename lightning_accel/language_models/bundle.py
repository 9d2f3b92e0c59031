"""Write bundles of language models: one folder per format, the tokenizer, the proof, the manifest."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_accel.benchmarking.environment import environment
from lightning_accel.bundle.writer import staged, write_manifest
from lightning_accel.errors import InvalidArgumentError, LightningAccelError, VerificationError
from lightning_accel.language_models.engines.registry import engine_entry
from lightning_accel.language_models.formats.registry import format_named
from lightning_accel.language_models.lora import hugging_face_model, save_adapter, set_adapters_
from lightning_accel.language_models.opening import ADAPTERS, KIND, TOKENIZER
from lightning_accel.language_models.proof import EngineProof, Reference, prove_engine, prove_format, render_prompts
from lightning_accel.language_models.report import render_markdown, render_page
from lightning_accel.language_models.shipped import (
    ShippedModel,
    check_tokenizer,
    reference_model,
    shipped_model,
    write_tokenizer,
)

PACKAGES = (
    "transformers",
    "tokenizers",
    "peft",
    "compressed-tensors",
    "gguf",
    "onnxruntime-genai",
    "xllamacpp",
    "openvino-genai",
)
_WITH_ADAPTERS = ("transformers", "vllm")


def write_language_bundle(
    module: nn.Module,
    dirpath: str | Path,
    tokenizer: Any,
    held_out: torch.Tensor,
    *,
    formats: Sequence[str],
    engines: Sequence[str],
    new_tokens: int = 24,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a trained language model in several formats, prove each, and replace the bundle in one step.

    Args:
        module: a :class:`CausalLM`, or any module around one model of transformers.
        dirpath: folder of the bundle.
        tokenizer: a fast tokenizer of transformers.
        held_out: token ids ``(N, T)`` that weren't trained on; prompts and perplexity come from them.
        formats: of the files; those that ``engines`` read are added.
        engines: to run and compare on this machine.
        new_tokens: greedy tokens that are compared for each prompt.
        provenance: facts of the run, for the manifest.

    Returns:
        The report: ``formats``, ``engines`` and ``failed`` by name, ``environment``.

    Raises:
        InvalidArgumentError: a format can't hold the network; names are unknown.
        VerificationError: a file's integers aren't the trained ones, or no engine passed. Nothing is written then.
    """
    shipped = shipped_model(module)
    check_tokenizer(tokenizer, int(shipped.config["vocab_size"]))
    names = with_formats_of(formats, engines)
    check_writable(shipped, names)
    prompts, text = render_prompts(held_out)
    active = list(shipped.adapters)
    reference = Reference(reference_model(shipped), prompts, text, new_tokens)  # without adapters that are kept apart
    machine = environment()
    machine["packages"] |= language_packages()
    report: dict[str, Any] = {"formats": {}, "engines": {}, "failed": {}, "environment": machine}
    with staged(dirpath) as folder:
        digests = write_tokenizer(tokenizer, folder / TOKENIZER)
        for name in names:
            format_named(name).write(shipped, tokenizer, folder / name)
            proof = prove_format(name, folder, shipped, reference)
            if proof.reason:
                raise VerificationError(f"Format `{name}` must hold the trained integers, but {proof.reason}.")
            report["formats"][name] = vars(proof)
        adapter = _write_adapters(module, folder, active, prompts, text, new_tokens)
        for engine in engines:
            proven = _proven(engine, folder, reference, tokenizer, adapter)
            kind = "failed" if proven.reason else "engines"
            report[kind][engine] = {**proven.to_dict(), "file": _file(engine)}
        if engines and not report["engines"]:
            reasons = "; ".join(f"{name}: {entry['reason']}" for name, entry in report["failed"].items())
            raise VerificationError(f"An engine must compute the trained network, but none does: {reasons}.")
        report |= _facts(shipped, active)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "report.md").write_text(render_markdown(report))
        (folder / "report.html").write_text(render_page(report))
        first = next(iter(report["engines"]), None)
        write_manifest(
            folder,
            {
                "kind": KIND,
                "architecture": shipped.architecture,
                "engines": report["engines"],
                "failed": report["failed"],
                "default": None if first is None else {"engine": first, "file": _file(first)},
                "tokenizer": digests,
                "grid": report["grid"],
                "context": context_of(shipped),
                "vocabulary": int(shipped.config["vocab_size"]),
                "complete": not report["failed"],
                **(provenance or {}),
            },
        )
    return report


def language_packages() -> dict[str, str]:
    """Installed packages that read or write language models, with their versions."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _facts(shipped: ShippedModel, adapters: Sequence[str]) -> dict[str, Any]:
    grid = shipped.grid
    quantized = sum(q.numel() for q, _ in shipped.integers.values())
    total = sum(p.numel() for p in shipped.model.parameters() if p.ndim)
    return {
        "architecture": shipped.architecture,
        "grid": None if grid is None else {"bits": grid.bits, "group": grid.group},
        "parameters": total,
        "quantized_parameters": quantized,
        "adapters": list(adapters),
    }


def context_of(shipped: ShippedModel) -> int:
    """Longest sequence of the network."""
    return int(shipped.config.get("max_position_embeddings") or shipped.config.get("n_positions") or 2048)


def with_formats_of(formats: Sequence[str], engines: Sequence[str]) -> list[str]:
    """Formats with those that the engines read, each once."""
    names = [*formats, *(engine_entry(engine).format for engine in engines)]
    return list(dict.fromkeys(format_named(name).name for name in names))


def check_writable(shipped: ShippedModel, formats: Sequence[str]) -> None:
    """Raise if a format can't hold a network.

    Raises:
        InvalidArgumentError: one can't; the message has the reason.
    """
    for name in formats:
        if reason := format_named(name).refuses(shipped):
            raise InvalidArgumentError(
                f"Argument `formats` must hold formats for this network, but got {name!r}: {reason}. Leave it and its engines out."
            )


def _write_adapters(
    module: nn.Module, folder: Path, names: Sequence[str], prompts: list[list[int]], text: list[int], new_tokens: int
) -> dict[str, Any] | None:
    """Write the adapters that are kept apart; returns the first one, to be proven."""
    if not names:
        return None
    for name in names:
        save_adapter(module, folder / ADAPTERS / name, name)
    model = copy.deepcopy(hugging_face_model(module)[1])
    set_adapters_(model, names[0])
    return {"folder": folder / ADAPTERS / names[0], "model": Reference(model.eval(), prompts, text, new_tokens)}


def _proven(
    engine: str, folder: Path, reference: Reference, tokenizer: Any, adapter: Mapping[str, Any] | None
) -> EngineProof:
    """The proof of an engine; one engine's failure is its own."""
    try:
        given = adapter if engine in _WITH_ADAPTERS else None
        proof = prove_engine(engine, folder, reference, tokenizer, adapter=given)
    except Exception as error:  # whatever a foreign runtime raises
        text = str(error) if isinstance(error, LightningAccelError) else f"{type(error).__name__}: {error}"
        return EngineProof(engine, engine_entry(engine).format, reason=(text.splitlines() or ["no message"])[0])
    return proof


def _file(engine: str) -> str:
    """Main file of an engine in the bundle."""
    one = format_named(engine_entry(engine).format)
    return f"{one.name}/{one.file}"
