"""From a batch to a call: what is a batch dimension and what only has its size."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.calls.loaders import peek

LENGTH = 4


class Attends(nn.Module):
    """Attention under a mask (L, L) that the caller gives."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 12), nn.Linear(12, width), nn.Linear(width, 3)

    def forward(self, x, mask):
        x = self.embed(x)  # N, L, D
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        x = self.norm(x + scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).flatten(2))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


class Masked(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Attends()

    def forward(self, x, mask):
        return self.net(x, mask)

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        return cross_entropy(self(x, mask), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x, y, torch.ones(LENGTH, LENGTH).tril().bool()


def inputs(batch):
    return batch[0], batch[2]


@pytest.mark.parametrize("batch_size", [LENGTH, LENGTH + 1])
def test_a_mask_as_large_as_the_batch_is_no_batch(trainer, batch_size):
    """(L, L) beside a batch of L: captured, pruned and distilled as beside any other batch."""
    data = TensorDataset(torch.randn(2 * batch_size + 1, LENGTH, 5), torch.randint(0, 3, (2 * batch_size + 1,)))
    module = la.DistillationModule(
        Masked(),
        Attends(16),
        losses=["kd", la.LossTerm("hidden", student_layer="net.norm", teacher_layer="norm")],
        inputs=inputs,
    )
    calls = [
        la.ChannelPruning(0.3, start=1, end=1, inputs=inputs),
        la.QuantizationAwareTraining("portable", start=2, inputs=inputs, calibration_batches=1),
    ]
    trainer(*calls, max_epochs=3).fit(module, DataLoader(data, batch_size, collate_fn=collate))
    assert module.net.up.out_features < 12
    with torch.no_grad():
        assert module.eval()(*inputs(collate([data[i] for i in range(7)]))).shape == (7, 3)


def test_as_many_samples_as_asked_for():
    loader = DataLoader(TensorDataset(torch.arange(6)), 4)
    assert peek(loader)[0].tolist() == [0, 1, 2, 3]
    assert peek(loader, samples=2)[0].tolist() == [0, 1]
    assert peek(loader, samples=9)[0].tolist() == [0, 1, 2, 3, 4, 5]
