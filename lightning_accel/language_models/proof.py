"""Prove that each file and each engine computes the trained network: integers, logits, tokens, perplexity, tokenizer."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.language_models.engines.base import TextEngine, log_softmax
from lightning_accel.language_models.engines.registry import engine_entry, open_engine
from lightning_accel.language_models.formats import onnx_genai
from lightning_accel.language_models.formats.registry import format_named
from lightning_accel.language_models.shipped import ShippedModel

_TOP = 5  # most probable tokens whose log-probabilities are compared
FLOAT_ERROR = 1e-5  # share of the spread of the logits: float32 in another order of summation, unless the network's own noise is more
_NOISE = 10  # times the difference of the network in float32 and in float64
KERNEL_ERROR = 0.25  # nats, largest difference of a log-probability of int8 activations, float16 and their like
PERPLEXITY_ERROR = 0.02  # relative
_FLOAT_ENGINES = ("transformers",)


@dataclass
class FormatProof:
    """Comparison of a file's integers with the trained ones.

    Attributes:
        format: name.
        integers: number of integers.
        equal: how many are equal.
        scales_equal: whether all scales are.
        float_error: largest difference of a logit of the file computed with float32 activations, as a share of the spread of all
            logits; ``None`` where the engine's own check does that.
        bytes: size of the folder.
        reason: why it failed; empty if it passed.
    """

    format: str
    integers: int
    equal: int
    scales_equal: bool
    float_error: float | None
    bytes: int
    reason: str = ""


@dataclass
class EngineProof:
    """Comparison of an engine with the trained network.

    Attributes:
        engine: name.
        format: of the file that it reads.
        logit_error: largest difference of a logit, as a share of their spread; ``None`` if the engine doesn't return logits.
        logit_limit: largest error of float32 in another order of summation.
        log_probability_error: largest difference of the log-probabilities of the most probable next tokens, in nats; ``None`` likewise.
        agreement: share of greedy tokens that are equal up to each prompt's first difference.
        first_difference: position of the earliest differing token; ``None`` if all are equal.
        margin: difference of the reference's two largest logits there: small where the choice is a near tie.
        perplexity: of held-out tokens through the engine; ``None`` if it doesn't return probabilities.
        reference_perplexity: of the same tokens through the trained network.
        tokenizer_equal: whether the tokenizer in the file gives the same tokens and the same rendered chat; ``None`` if the engine
            takes tokens only.
        batched_equal: whether prompts at once give the tokens of single ones.
        adapter_error: largest difference of a log-probability with an adapter; ``None`` without one.
        adapter_effect: largest change of a log-probability by the adapter: 0 if the engine ignores it.
        reason: why it failed; empty if it passed.
    """

    engine: str
    format: str
    logit_error: float | None = None
    logit_limit: float = FLOAT_ERROR
    log_probability_error: float | None = None
    agreement: float = 0.0
    first_difference: int | None = None
    margin: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    tokenizer_equal: bool | None = None
    batched_equal: bool = False
    adapter_error: float | None = None
    adapter_effect: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass
class Reference:
    """The trained network and what engines are compared on.

    Args:
        model: plain float32 model with the shipped values.
        prompts: token ids of one length.
        held_out: token ids of one longer text.
        new_tokens: greedy tokens per prompt.
    """

    model: nn.Module
    prompts: list[list[int]]
    held_out: list[int]
    new_tokens: int = 24

    def __post_init__(self) -> None:
        self.answers = [self._greedy(prompt) for prompt in self.prompts]
        self.float_limit = max(FLOAT_ERROR, _NOISE * self._noise())

    @torch.no_grad()
    def _noise(self) -> float:
        """Largest difference of a logit in float32 from float64, as a share of the spread of all."""
        exact = copy.deepcopy(self.model).double()
        expected = exact(torch.tensor([self.prompts[0]]), use_cache=False).logits[0].numpy()
        return float(np.abs(self.logits(self.prompts[0]) - expected).max() / np.ptp(expected))

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits ``(T, V)``."""
        result: np.ndarray = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
        return result

    def _greedy(self, prompt: Sequence[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(self.new_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def margin(self, tokens: Sequence[int]) -> float:
        """Difference of the two largest logits of the next token."""
        first, second = np.sort(self.logits(tokens)[-1])[::-1][:2]
        return float(first - second)

    def perplexity(self) -> float:
        """Of the held-out tokens."""
        values = log_softmax(self.logits(self.held_out)[:-1])
        return float(np.exp(-values[np.arange(len(values)), self.held_out[1:]].mean()))


def prove_format(name: str, bundle: Path, shipped: ShippedModel, reference: Reference) -> FormatProof:
    """Read a file back and compare every integer and scale with the trained ones."""
    folder, one = bundle / name, format_named(name)
    found = one.read(folder, shipped)
    wanted = shipped.integers
    total = sum(q.numel() for q, _ in wanted.values())
    pairs = [(wanted[layer], found[layer]) for layer in wanted if layer in found]
    equal = sum(int((ours[0] == theirs[0]).sum()) for ours, theirs in pairs if ours[0].shape == theirs[0].shape)
    scales = len(pairs) == len(wanted) and all(torch.equal(a[1].float(), b[1].float()) for a, b in pairs)
    proof = FormatProof(
        name, total, equal, scales, None, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    )
    if extra := sorted(found.keys() - wanted.keys()):
        proof.reason = f"`{extra[0]}` is quantized in the file and float in the trained network"
    elif equal != total or not scales:
        proof.reason = f"{total - equal:,} of {total:,} integers differ" if equal != total else "scales differ"
    elif name == "onnx-genai":
        expected = reference.logits(reference.prompts[0])
        error = np.abs(onnx_genai.float_logits(folder, reference.prompts[0]) - expected).max() / np.ptp(expected)
        proof.float_error = float(error)
        if error > FLOAT_ERROR:
            proof.reason = (
                f"with float32 activations its logits differ by {error:.2g} of their spread (limit {FLOAT_ERROR:g})"
            )
    return proof


def prove_engine(
    name: str,
    bundle: Path,
    reference: Reference,
    tokenizer: Any,
    *,
    adapter: Mapping[str, Any] | None = None,
    **options: Any,
) -> EngineProof:
    """Run an engine on the file in a bundle and compare it with the trained network.

    Args:
        name: of the engine.
        bundle: folder.
        reference: the trained network, and the prompts.
        tokenizer: the one that was written.
        adapter: ``folder`` of an adapter and the ``model`` (a :class:`Reference`) that computes with it.
        options: of the engine.
    """
    proof = EngineProof(name, engine_entry(name).format, logit_limit=reference.float_limit)
    with open_engine(name, bundle, **options) as engine:
        _compare_logits(proof, engine, reference)
        _compare_tokens(proof, engine, reference)
        scores = engine.token_log_probabilities(reference.held_out)
        proof.reference_perplexity = reference.perplexity()
        proof.perplexity = None if scores is None else math.exp(-float(np.mean(scores)))
        proof.tokenizer_equal = _same_tokenizer(engine, tokenizer)
        single = [engine.generate(p, reference.new_tokens) for p in reference.prompts]
        proof.batched_equal = engine.generate_all(reference.prompts, reference.new_tokens) == single
    if adapter is not None:
        with open_engine(name, bundle, adapter=adapter["folder"], **options) as engine:
            _compare_adapter(proof, engine, reference, adapter["model"])
    proof.reason = judge(proof)
    return proof


def _compare_logits(proof: EngineProof, engine: TextEngine, reference: Reference) -> None:
    errors = []
    for prompt in reference.prompts:
        expected = reference.logits(prompt)
        found = engine.logits(prompt)
        if found is not None:
            error = float(np.abs(found - expected).max() / np.ptp(expected))
            proof.logit_error = max(proof.logit_error or 0.0, error)
        top = engine.next_log_probabilities(prompt, _TOP)
        if top is not None:
            values = log_softmax(expected[-1])
            errors += [abs(value - float(values[token])) for token, value in top.items()]
    proof.log_probability_error = max(errors) if errors else None


def _compare_tokens(proof: EngineProof, engine: TextEngine, reference: Reference) -> None:
    equal = 0
    for prompt, expected in zip(reference.prompts, reference.answers, strict=True):
        found = engine.generate(prompt, reference.new_tokens)
        first = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
        equal += reference.new_tokens if first is None else first
        if first is None:
            continue
        margin = reference.margin([*prompt, *expected[:first]])
        proof.margin = max(proof.margin or 0.0, margin)
        earliest = proof.first_difference
        proof.first_difference = first if earliest is None else min(earliest, first)
    proof.agreement = equal / (len(reference.prompts) * reference.new_tokens)


def _same_tokenizer(engine: TextEngine, tokenizer: Any) -> bool | None:
    encode, render = getattr(engine, "encode", None), getattr(engine, "render", None)
    if encode is None:
        return None
    text = "The import statement, e.g. `import os`:\n\n  two  spaces, 123456, naïve, don't"
    if encode(text) != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
        return False
    if render is None or not tokenizer.chat_template:
        return True
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Why?"},
    ]
    return bool(render(messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _compare_adapter(proof: EngineProof, engine: TextEngine, base: Reference, adapted: Reference) -> None:
    errors, effects = [], []
    for prompt in base.prompts:
        found = engine.next_log_probabilities(prompt, _TOP)
        if found is None:
            continue
        with_it, without = log_softmax(adapted.logits(prompt)[-1]), log_softmax(base.logits(prompt)[-1])
        errors += [abs(value - float(with_it[token])) for token, value in found.items()]
        effects += [abs(value - float(without[token])) for token, value in found.items()]
    proof.adapter_error, proof.adapter_effect = (max(errors), max(effects)) if errors else (None, 0.0)


def judge(proof: EngineProof) -> str:
    """Why an engine doesn't compute the trained network; empty if it does.

    Engines that compute in float32 must have the same logits up to the order of summation. Others round activations to int8 or float16:
    their log-probabilities must be close, and they may choose another token only where two are nearly equally probable.
    """
    if proof.engine in _FLOAT_ENGINES and (proof.logit_error is None or proof.logit_error > proof.logit_limit):
        return f"its logits differ by {proof.logit_error:.2g} of their spread (limit {proof.logit_limit:.2g})"
    if proof.log_probability_error is not None and proof.log_probability_error > KERNEL_ERROR:
        return f"log-probabilities differ by {proof.log_probability_error:.2g} nats (limit {KERNEL_ERROR})"
    if proof.margin is not None and proof.margin > 2 * KERNEL_ERROR:
        return (
            f"it chooses another token at position {proof.first_difference}, where the trained network prefers its own by "
            f"{proof.margin:.2g} nats (limit {2 * KERNEL_ERROR})"
        )
    if proof.perplexity is not None and proof.reference_perplexity is not None:
        error = abs(proof.perplexity / proof.reference_perplexity - 1)
        if error > PERPLEXITY_ERROR:
            return f"its perplexity of {proof.perplexity:.2f} isn't the trained {proof.reference_perplexity:.2f}"
    if proof.tokenizer_equal is False:
        return "the tokenizer or the chat template in its file gives other tokens"
    if proof.adapter_effect is not None:
        if proof.adapter_error is None or proof.adapter_effect <= proof.adapter_error:
            return "it ignores the adapter: its outputs are those of the base"
        if proof.adapter_error > KERNEL_ERROR:
            return f"with the adapter log-probabilities differ by {proof.adapter_error:.2g} nats (limit {KERNEL_ERROR})"
    return ""


def render_prompts(tokens: torch.Tensor, count: int = 4, length: int = 16) -> tuple[list[list[int]], list[int]]:
    """Prompts and one longer text from held-out sequences ``(N, T)``.

    Returns:
        Beginnings of the first sequences, and the first sequence, at most 64 tokens of it.
    """
    size = min(length, max(tokens.shape[1] // 2, 1))
    return [row[:size].tolist() for row in tokens[:count]], tokens[0][:64].tolist()
