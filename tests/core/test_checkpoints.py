"""Checkpoints whose hyper-parameters are objects are read without unpickling them, and say what they need."""

import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.core.checkpoints import ForeignObject, foreign_in, load_without_objects, unreadable
from lightning_accel.core.structure import read_checkpoint
from lightning_accel.errors import InvalidArgumentError


class Weighted:
    """A loss that is no module."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, logits, target):
        return self.weight * nn.functional.cross_entropy(logits, target)


class Explodes:
    ran = False

    def __reduce__(self):
        return _explode, ()


def _explode():
    Explodes.ran = True


class Holds(L.LightningModule):
    def __init__(self, net, loss, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.loss = net, loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def module():
    return Holds(network(), Weighted(2.0), width=7)


def loader():
    x = torch.randn(32, 8)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
def test_such_a_module_ships_and_its_checkpoint_says_what_it_needs(trainer, tmp_path):
    trained = module()
    export = la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16)
    fit = trainer(la.WeightPruning(sparsity=0.5, end=1), export)
    with pytest.warns(
        UserWarning, match=r"hold objects, `net` \(Sequential\), `loss` \(Weighted\), .*Holds, path, net=..., loss=..."
    ):
        fit.fit(trained, loader(), loader())
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["complete"]
    path = tmp_path / "b.ckpt"
    with pytest.raises(
        InvalidArgumentError, match=r"`net` of Holds must be passed, .* holds a torch.nn.modules.container.Sequential"
    ):
        la.load_from_checkpoint(Holds, path)
    loaded = la.load_from_checkpoint(Holds, path, net=network(), loss=Weighted(2.0))
    x = torch.randn(4, 8)
    assert torch.equal(loaded(x), trained.eval()(x))
    assert loaded.hparams["width"] == 7


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
@pytest.mark.filterwarnings("ignore:Hyper-parameters of Holds hold objects")
def test_the_best_checkpoint_ships(trainer, tmp_path):
    best = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor="loss")
    export = la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16, ckpt_path="best")
    trained = module()
    trainer(export, best, enable_checkpointing=True).fit(trained, loader(), loader())
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
@pytest.mark.filterwarnings("ignore:Attribute 'loss' removed from hparams because it cannot be pickled")
@pytest.mark.filterwarnings("ignore:Hyper-parameters of Holds hold objects, `net`")
def test_what_cannot_be_saved_is_asked_for(trainer, tmp_path):
    def loss(logits, target):
        return nn.functional.cross_entropy(logits, target)

    trained = Holds(network(), loss)
    trainer(la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16)).fit(trained, loader(), loader())
    with pytest.raises(
        InvalidArgumentError, match=r"or be passed, but got \['net', 'width'\]: missing a required argument: 'loss'"
    ):
        la.load_from_checkpoint(Holds, tmp_path / "b.ckpt", net=network())
    loaded = la.load_from_checkpoint(Holds, tmp_path / "b.ckpt", net=network(), loss=loss)
    assert torch.equal(loaded.net[0].weight, trained.net[0].weight)


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
def test_check_names_them():
    found = la.check(module(), torch.zeros(2, 8), engines=[])[0]
    assert (found.step, found.status) == ("train", "ok")
    assert [line.split(":")[0] for line in found.lines] == [
        "the hyper-parameter `net` holds a Sequential",
        "the hyper-parameter `loss` holds a Weighted",
    ]


def test_nothing_of_an_object_runs(tmp_path):
    value = {
        "state_dict": {"w": torch.arange(3.0)},
        "hyper_parameters": {"bad": [Explodes()], "lr": 0.1, "net": network()},
    }
    torch.save(value, tmp_path / "a.ckpt")
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(read["state_dict"]["w"], torch.arange(3.0))
    assert not Explodes.ran
    assert read["hyper_parameters"]["lr"] == 0.1
    assert foreign_in(read["hyper_parameters"]["bad"]).endswith("._explode")
    assert isinstance(load_without_objects(tmp_path / "a.ckpt")["hyper_parameters"]["net"], ForeignObject)
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert Explodes.ran  # as the plain way does


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "torch.load"])
def test_a_function_that_could_run_code_is_a_placeholder(tmp_path, name):
    where, _, what = name.rpartition(".")

    class Calls:
        def __reduce__(self):
            return getattr(__import__(where), what), ("1",)

    torch.save({"state_dict": {}, "x": Calls()}, tmp_path / "a.ckpt")
    assert isinstance(read_checkpoint(tmp_path / "a.ckpt")["x"], ForeignObject)


def test_a_damaged_file_is_called_damaged(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(InvalidArgumentError, match=r"must be a readable checkpoint.*damaged or half-written"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_unreadable_values_and_their_classes():
    values = {"lr": 0.1, "sizes": [1, 2], "loss": Weighted(1.0), "act": nn.ReLU(), "call": lambda x: x}
    assert unreadable(values) == {"loss": "Weighted", "act": "ReLU", "call": "function"}
