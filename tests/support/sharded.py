"""A network with uneven shards, and fits of it on one process or on the ranks of FSDP2."""

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accel.core.shards import reshard, whole


class Net(L.LightningModule):
    """Rows that two ranks don't divide; weights on a grid, so that many scores are equal."""

    def __init__(self, width: int = 7, shard_teacher: bool = False, grid: int = 0):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 13, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(13 * 16, 5)
        if grid:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_((parameter * grid).round() / grid)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, 0.9)

    def configure_model(self):
        if isinstance(self._trainer and self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            if self.hparams.shard_teacher:
                fully_shard(self.teacher.body, mesh=mesh)
                fully_shard(self.teacher, mesh=mesh)
            fully_shard(self.body, mesh=mesh)
            fully_shard(self.head, mesh=mesh)
            fully_shard(self, mesh=mesh)


def data(count: int = 64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 1, 16, 16, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    for i, c in enumerate(y.tolist()):
        x[i, :, 8 * (c // 2) : 8 * (c // 2) + 8, 8 * (c % 2) : 8 * (c % 2) + 8] += 2.0
    return TensorDataset(x, y)


class Batches(L.LightningDataModule):
    """The ranks together see in each batch what one process sees."""

    def train_dataloader(self):
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data(), ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data(), 16 // ranks, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(data(32, 1), 16)


class Losses(L.Callback):
    """The mean loss of all ranks in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.seen.append(float(loss) / trainer.world_size)


def fit(module, *callbacks, ranks: int = 1, epochs: int = 3, ckpt_path=None, strategy=None, accumulate: int = 1):
    """Train; returns the Trainer, losses and whole weights."""
    if strategy is None and ranks > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or "auto",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[*callbacks, losses],
    )
    trainer.fit(module, datamodule=Batches(), ckpt_path=ckpt_path)
    reshard(module)
    return trainer, losses.seen, {name: whole(p.detach()).clone() for name, p in module.named_parameters()}
