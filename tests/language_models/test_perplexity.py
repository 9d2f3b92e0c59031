import math

import pytest
import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.perplexity import Perplexity, labels_of, next_tokens, token_nll

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from tests.support.language import llama, tokens  # noqa: E402  # after the skip


def test_it_is_the_loss_of_transformers():
    model, ids = llama(), tokens()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    total, count = token_nll(out.logits, ids)
    assert count == 16 * 31
    torch.testing.assert_close(total / count, out.loss)


def test_tokens_count_equally_over_batches_of_different_lengths():
    metric, logits = Perplexity(), torch.randn(5, 7, 11)
    labels = torch.randint(11, (5, 7))
    metric.update(logits[:3], labels[:3])
    metric.update(logits[3:, :4], labels[3:, :4])
    parts = [
        torch.log_softmax(logits[n], -1)[t, labels[n, t + 1]].item() for n in range(5) for t in range(6 if n < 3 else 3)
    ]
    assert metric.compute().item() == pytest.approx(math.exp(-sum(parts) / 24), rel=1e-5)


def test_it_equals_torchmetrics_on_shifted_labels():
    from torchmetrics.text import Perplexity as Reference

    logits, ids = torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    labels = labels_of(ids, torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]))
    metric, reference = Perplexity(), Reference(ignore_index=-100)
    metric.update(logits, labels)
    reference.update(logits, next_tokens(labels))
    torch.testing.assert_close(metric.compute(), reference.compute())


def test_shapes_are_checked():
    with pytest.raises(InvalidArgumentError, match=r"`labels` must be \(N, T\) for logits"):
        token_nll(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
