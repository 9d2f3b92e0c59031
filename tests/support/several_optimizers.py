"""LightningModules with manual optimization and several optimizers, as their papers train them, in a few seconds."""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tests.support.models import Residual, images


class GAN(L.LightningModule):
    """Generator and discriminator in one step, each with its optimizer and `toggle_optimizer` (https://arxiv.org/abs/1406.2661)."""

    def __init__(self, width: int = 16, noise: int = 8, critics: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(noise, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 16),
        )
        self.discriminator = nn.Sequential(nn.Linear(16, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, noise):
        return self.generator(noise)

    def noise(self, like):
        return torch.randn(len(like), self.hparams.noise, device=like.device)

    def training_step(self, batch, batch_idx):
        (real,) = batch
        g, d = self.optimizers()
        for _ in range(self.hparams.critics):
            self.toggle_optimizer(d)
            fake = self(self.noise(real)).detach()
            told = torch.cat([self.discriminator(real), self.discriminator(fake)])
            truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)])
            d_loss = binary_cross_entropy_with_logits(told, truth)
            d.zero_grad()
            self.manual_backward(d_loss)
            d.step()
            self.untoggle_optimizer(d)
        self.toggle_optimizer(g)
        told = self.discriminator(self(self.noise(real)))
        g_loss = binary_cross_entropy_with_logits(told, torch.ones_like(told))
        g.zero_grad()
        self.manual_backward(g_loss)
        g.step()
        self.untoggle_optimizer(g)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss})

    def validation_step(self, batch, batch_idx):
        self.log("val_score", self.discriminator(self(batch[0][:, : self.hparams.noise])).mean())

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), 0.01, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), 0.01, betas=(0.5, 0.9)),
        ]


class ActorCritic(L.LightningModule):
    """Actor and critic on logged transitions, with a target network that no optimizer updates (https://arxiv.org/abs/1509.02971)."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.actor = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        self.critic = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))
        self.target = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))
        self.target.load_state_dict(self.critic.state_dict())

    def forward(self, state):
        return torch.tanh(self.actor(state))

    def training_step(self, batch, batch_idx):
        state, action, reward, after = batch
        actor, critic = self.optimizers()
        with torch.no_grad():
            value = reward + 0.9 * self.target(torch.cat([after, self(after)], 1))
        critic_loss = mse_loss(self.critic(torch.cat([state, action], 1)), value)
        critic.zero_grad()
        self.manual_backward(critic_loss)
        critic.step()
        actor_loss = -self.critic(torch.cat([state, self(state)], 1)).mean()
        actor.zero_grad()
        self.manual_backward(actor_loss)
        actor.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
        self.log_dict({"actor_loss": actor_loss, "critic_loss": critic_loss})

    def validation_step(self, batch, batch_idx):
        self.log("val_value", self.critic(torch.cat([batch[0], self(batch[0])], 1)).mean())

    def configure_optimizers(self):
        return [torch.optim.Adam(self.actor.parameters(), 0.003), torch.optim.Adam(self.critic.parameters(), 0.01)]


class SimCLR(L.LightningModule):
    """Two views of each image, with a call of the encoder for each (https://arxiv.org/abs/2002.05709)."""

    def __init__(self, width: int = 8, manual: bool = True):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = not manual
        self.encoder = Residual(width)
        self.projection = nn.Linear(4, 8)

    def forward(self, x):
        return self.encoder(x)

    def loss(self, first, second):
        both = torch.cat([self.projection(first), self.projection(second)])
        near = cosine_similarity(both[:, None], both[None], dim=-1) / 0.5
        near = near.masked_fill(torch.eye(len(both), dtype=torch.bool), -torch.inf)
        return cross_entropy(near, torch.arange(len(both)).roll(len(first)))

    def views(self, x):
        return x + 0.2 * torch.randn_like(x), x.flip(-1) + 0.2 * torch.randn_like(x)

    def training_step(self, batch, batch_idx):
        one, two = self.views(batch[0])
        first, second = self(one), self(two)
        loss = self.loss(first, second)
        if hasattr(self, "distill"):  # trained with a teacher
            loss = loss + 0.5 * (self.distill(batch, first) + self.distill(batch, second))
        self.log("ssl_loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(*(self(view) for view in self.views(batch[0]))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class Alternating(L.LightningModule):
    """Body and head of a classifier take turns, two batches each, with a schedule for each optimizer."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        turn = batch_idx // 2 % 2
        optimizer = self.optimizers()[turn]
        logits = self(x)
        loss = cross_entropy(logits, y)
        if hasattr(self, "distill"):
            loss = self.distill(batch, logits, loss)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers()[turn].step()
        self.log("train_loss", loss)

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(self.body.parameters(), 0.1, 0.9), torch.optim.Adam(self.head.parameters(), 0.02)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98) for optimizer in optimizers]


def points(count: int = 64, seed: int = 0) -> TensorDataset:
    """Points (count, 16) on a curve, for the GAN."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.linspace(0, 3, 16) * torch.rand(count, 1, generator=generator).mul(2).sin())


def transitions(count: int = 64, seed: int = 0) -> TensorDataset:
    """State, action, reward and next state, for the actor-critic."""
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.randn(count, 6, generator=generator), torch.rand(count, 2, generator=generator) * 2 - 1
    reward = -(action - state[:, :2].tanh()).square().sum(1, keepdim=True)
    return TensorDataset(state, action, reward, torch.randn(count, 6, generator=generator))


KINDS = {
    "gan": (GAN, points, "generator"),
    "actor-critic": (ActorCritic, transitions, "actor"),
    "simclr": (SimCLR, images, "encoder"),
    "alternating": (Alternating, images, "body"),
}


def loaders_of(kind: str, count: int = 64, batch_size: int = 8) -> tuple[DataLoader, DataLoader]:
    """Training and validation loader of a module in `KINDS`."""
    data = KINDS[kind][1]
    return DataLoader(data(count), batch_size, shuffle=True), DataLoader(data(count, 1), 32)
