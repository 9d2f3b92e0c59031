import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.causal_lm import CausalLM
from lightning_accel.language_models.perplexity import next_tokens
from lightning_accel.language_models.token_kl import TokenKL, in_chunks, token_kl, top_k_kl

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from tests.support.language import llama, tokens, trainer  # after the skip


def reference(student, teacher, temperature=1.0):
    """KL(teacher ‖ student) in NumPy."""
    s, t = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (student, teacher))
    return (t * np.log(t / s)).sum() * temperature**2


def test_both_directions_are_the_formula():
    student, teacher = np.random.default_rng(0).standard_normal((2, 5, 7))
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    assert token_kl(s, t).item() == pytest.approx(reference(student, teacher), rel=1e-5)
    assert token_kl(s, t, "reverse").item() == pytest.approx(reference(teacher, student), rel=1e-5)
    assert token_kl(s, t, temperature=2.0).item() == pytest.approx(reference(student, teacher, 2.0), rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_with_the_rest_is_the_divergence_of_grouped_distributions(direction):
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    values, classes = teacher.topk(3)
    rest = teacher.scatter(-1, classes, -torch.inf).logsumexp(-1)
    grouped = []
    for logits in (student, teacher):
        p = logits.softmax(-1)
        kept = p.gather(-1, classes)
        grouped.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))
    s, t = grouped
    expected = (t * (t / s).log()).sum() if direction == "forward" else (s * (s / t).log()).sum()
    found = top_k_kl(student, values, classes, rest, direction)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found <= token_kl(student, teacher, direction) + 1e-6
    values, classes = teacher.topk(8)  # all but one: nothing is grouped
    rest = teacher.scatter(-1, classes, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(
        top_k_kl(student, values, classes, rest, direction), token_kl(student, teacher, direction), rtol=1e-3, atol=1e-4
    )


def test_chunks_give_the_same_loss_and_gradient():
    weight = torch.randn(11, 6, requires_grad=True)
    rows, targets = torch.randn(10, 6), torch.randint(11, (10,))

    def loss(x, y):
        return (F.cross_entropy(x @ weight.t(), y, reduction="sum"),)

    results = []
    for chunk in (3, 100):
        weight.grad = None
        (total,) = in_chunks(loss, chunk, rows, targets)
        total.backward()
        results.append((total.detach(), weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_logits_of_all_positions_never_exist_at_once():
    """Memory: the largest tensor that is kept for the backward pass is far below positions x vocabulary."""
    student, teacher = llama(0, vocabulary=2000), llama(1, vocabulary=2000)
    distill = TokenKL(teacher, chunk=8)
    distill.setup(student)
    ids = tokens(4, 64)
    largest = 0

    def pack(tensor):
        nonlocal largest
        if tensor.data_ptr() not in weights:
            largest = max(largest, tensor.numel())
        return tensor

    weights = {p.data_ptr() for m in (student, teacher) for p in m.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        distill(student, ids, None, next_tokens(ids))
    assert largest < 4 * 64 * 2000 / 8


def test_the_loss_is_that_of_whole_logits_without_padding():
    student, teacher, ids = llama(0), llama(1), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    distill = TokenKL(teacher, chunk=7)
    distill.setup(student)
    labels = ids.masked_fill(mask == 0, -100)
    divergence, entropy = distill(student, ids, mask, next_tokens(labels))
    with torch.no_grad():
        s, t = (m(input_ids=ids, attention_mask=mask).logits for m in (student, teacher))
        out = student(input_ids=ids, attention_mask=mask, labels=labels)
    keep = torch.zeros_like(mask, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    expected = token_kl(s[keep], t[keep]) / keep.sum()
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, out.loss, rtol=1e-4, atol=1e-5)


def test_a_sequence_that_was_seen_before_needs_no_teacher(tmp_path):
    student, ids = llama(0), tokens(6)
    losses = []
    for attempt in range(2):
        distill = TokenKL(llama(1), top_k=8, cache=la.TeacherCache(tmp_path / "cache"), chunk=50)
        distill.setup(student)
        first = distill(student, ids[:4], None, next_tokens(ids[:4]))
        order = torch.tensor([3, 5, 0, 4])
        second = distill(student, ids[order], None, next_tokens(ids[order]))
        losses.append([*first, *second])
        assert distill.runs == (6 if attempt == 0 else 0)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    plain = TokenKL(llama(1), top_k=8)
    plain.setup(student)
    torch.testing.assert_close(plain(student, ids[:4], None, next_tokens(ids[:4]))[0], losses[0][0])


def test_a_damaged_or_half_written_cache_is_repaired(tmp_path):
    student, ids = llama(0), tokens(4)

    def run():
        distill = TokenKL(llama(1), top_k=8, cache=tmp_path / "cache")
        distill.setup(student)
        return distill(student, ids, None, next_tokens(ids))[0], distill.runs

    whole, runs = run()
    assert runs == 4
    file = tmp_path / "cache" / "32" / "0.tokens"
    content = bytearray(file.read_bytes())
    size = len(content) // 4
    content[size + 100] ^= 0xFF
    file.write_bytes(bytes(content[: 3 * size + 17]))  # row 1 damaged, row 3 cut off
    again, runs = run()
    assert runs == 2
    assert torch.equal(whole, again)
    other = TokenKL(llama(2), top_k=8, cache=tmp_path / "cache")
    other.setup(student)
    with pytest.raises(
        InvalidArgumentError, match=r"`cache` must be one of this teacher and these settings, but got .* with teacher"
    ):
        other(student, ids, None, next_tokens(ids))
    assert json.loads((tmp_path / "cache" / "32" / "tokens.json").read_text())["top_k"] == 8


def test_wrong_teachers_are_refused_before_training(tmp_path):
    module = CausalLM(llama(), distill=TokenKL(llama(vocabulary=200)))
    with pytest.raises(
        InvalidArgumentError, match="must have the student's vocabulary of 320 tokens, but got one of 200"
    ):
        trainer(tmp_path).fit(module, torch.utils.data.DataLoader(tokens(), 4))
    with pytest.raises(InvalidArgumentError, match="`top_k` must be below the vocabulary of 320 tokens, but got 320"):
        TokenKL(llama(), top_k=320).setup(llama())
    with pytest.raises(InvalidArgumentError, match="`teacher` must be a causal language model"):
        TokenKL(str(tmp_path)).setup(llama())
    with pytest.raises(InvalidArgumentError, match="`direction` must be one of"):
        TokenKL("t", direction="both")
    with pytest.raises(InvalidArgumentError, match="`alpha` must be above 0"):
        TokenKL("t", alpha=0.0)
    with pytest.raises(InvalidArgumentError, match="`temperature` must be above 0"):
        TokenKL("t", temperature=0.0)
    with pytest.raises(InvalidArgumentError, match="`chunk` and `top_k` must be at least 1"):
        TokenKL("t", chunk=0)
    with pytest.raises(InvalidArgumentError, match="`top_k` must be given with `cache`"):
        TokenKL("t", cache=tmp_path)
    distill = TokenKL(llama(1))
    distill.setup(llama())
    with pytest.raises(InvalidArgumentError, match="must score a token in each batch"):
        distill(llama(), tokens(), None, torch.full((16, 32), -100))
