"""Channels that buy measured latency."""

import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.core.structure import read_checkpoint
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.channels.latency import FloatFiles, _in_turns
from lightning_accel.pruning.channels.latency_table import LatencyTable
from lightning_accel.pruning.channels.latency_target import LatencyTarget
from tests.cli.test_lightning_cli import Data, _process, pytestmark  # noqa: F401 - the fixture and marks serve here too
from tests.support.models import Classifier, images


def group(name, units=32, **changes):
    return Group(name, (name,), units, changes.pop("original", units), 1, {}, frozenset(), frozenset(), {}, **changes)


def cost(units):
    """A network in blocks of 8: one layer from a to b, and one on b alone that is three times as dear."""
    a, b = (math.ceil(units[n] / 8) / 4 for n in "ab")
    return 0.1 + 0.3 * a * b + 0.6 * b


def table(**changes):
    whole = {"a": 32, "b": 32}
    counts = (28, 24, 20, 16, 12, 8, 4)
    ratios = {g: {n: cost({**whole, g: n}) / cost(whole) for n in counts} for g in whole}
    made = LatencyTable("onnxruntime", "1", "cpu", "fp32", 1, 1, 1.0, whole, ratios, ())
    pairs = [
        (sum(made.gain(g, n) for g in whole), -math.log(cost(dict.fromkeys(whole, n)) / cost(whole)))
        for n in (24, 16, 8)
    ]
    return LatencyTable(**{**made.to_dict(), "together": pairs, **changes})


def test_channels_leave_in_blocks_and_where_they_buy_most():
    target = LatencyTarget(1.5, table())
    groups, scores = [group("a"), group("b")], [torch.ones(32), torch.ones(32)]
    chosen = target.choose(groups, scores, [1, 1], 1.0)
    left = {g.name: g.units - len(chosen.get(i, [])) for i, g in enumerate(groups)}
    assert left == {"a": 32, "b": 16}  # b is in both layers; and 17 to 23 of its channels would cost what 24 do
    assert cost({"a": 32, "b": 32}) / cost(left) >= 1.5
    scores[1] *= 100  # unless they are important
    chosen = target.choose(groups, scores, [1, 1], 0.1)
    assert 1 not in chosen
    assert len(chosen[0]) == 8


def test_the_least_important_leave_and_gone_ones_count():
    target = LatencyTarget(1.5, table())
    scores = [1000 * torch.ones(32), torch.arange(24.0).flip(0)]
    chosen = target.choose([group("a"), group("b", 24, original=32)], scores, [1, 1], 1.0)
    assert chosen == {1: [16, 17, 18, 19, 20, 21, 22, 23]}
    assert target.choose([group("a"), group("b", 16, original=32)], [scores[0], torch.ones(16)], [1, 1], 1.0) == {}


def test_measurements_correct_the_table():
    off = table()
    off = LatencyTable(
        **{**off.to_dict(), "together": [(x, 0.6 * y) for x, y in off.together]}
    )  # believes that less is saved
    target = LatencyTarget(1.8, off)
    groups, scores, whole = [group("a"), group("b")], [torch.ones(32), torch.ones(32)], {"a": 32, "b": 32}
    chosen = target.choose(groups, scores, [1, 1], 1.0)
    before = cost(whole) / cost({g.name: 32 - len(chosen.get(i, [])) for i, g in enumerate(groups)})
    found = target.calibrate(groups, scores, [1, 1], lambda left: cost(whole) / cost(left))
    assert abs(math.log(found / 1.8)) < abs(math.log(before / 1.8))
    assert found == pytest.approx(1.8, rel=0.1)


def test_what_cannot_be_reached_is_refused():
    says = r"`latency_reduction` must be reachable .* at most \d+\.\d\d in onnxruntime, but got 50"
    with pytest.raises(InvalidArgumentError, match=says):
        LatencyTarget(50.0, table()).check([group("a"), group("b")], [4, 4])
    with pytest.raises(InvalidArgumentError, match=r"but got 1\.5"):
        LatencyTarget(1.5, table()).check([group("a"), group("b")], [4, 28])
    LatencyTarget(1.5, table()).check([group("a"), group("b")], [4, 4])


def test_a_table_comes_back_from_its_file_and_is_checked(tmp_path):
    one = table()
    one.write(tmp_path / "t.json")
    again = LatencyTable.read(tmp_path / "t.json")
    assert again.ratios == one.ratios
    assert again.gain_for(2.0) == pytest.approx(one.gain_for(2.0))
    assert again.reduction(again.gain_for(3.0)) == pytest.approx(3.0)
    again.check({"a": 32, "b": 32}, "fp32")
    with pytest.raises(
        InvalidArgumentError, match=r"must be of this network, but got one without its groups `c` \(8 units\)"
    ):
        again.check({"a": 32, "c": 8}, "fp32")
    with pytest.raises(
        InvalidArgumentError, match="must be of an int8 network, as this one ships, but got one of fp32"
    ):
        again.check({"a": 32}, "int8")
    (tmp_path / "t.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(InvalidArgumentError, match="must be a file that `lightning-accel latency-table` wrote"):
        LatencyTable.read(tmp_path / "t.json")
    with pytest.raises(la.LightningAccelError, match="which isn't there"):
        LatencyTable.read(tmp_path / "none.json")


def wide():
    return DataLoader(images(64), 8)


def test_a_run_measures_removes_and_keeps_its_table(trainer, tmp_path):
    module = Classifier(width=64)
    pruning = la.ChannelPruning(latency_reduction=1.3, start=0, end=1, threads=1)
    run = trainer(pruning, max_epochs=3)
    run.fit(module, wide())
    assert pruning.unfinished() == ""
    assert module.net.conv1.weight.shape[0] < 64
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = read_checkpoint(tmp_path / "x.ckpt")["callbacks"][pruning.state_key]
    assert LatencyTable.from_dict(state["latency"]["table"]) == pruning._latency.table
    assert set(pruning._latency.table.units) == {"net.conv1"}


def test_a_resumed_run_removes_the_same_channels(trainer, tmp_path):
    def run(epochs, ckpt=None):
        torch.manual_seed(3)
        module = Classifier(width=64)
        own = trainer(
            la.ChannelPruning(latency_reduction=1.3, start=1, end=2, threads=1), la.ExactResume(), max_epochs=epochs
        )
        own.fit(module, wide(), ckpt_path=ckpt)
        own.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, own.callbacks[0]

    part, first = run(3)
    longer, second = run(4, tmp_path / "3.ckpt")
    assert second._latency.table == first._latency.table
    assert second._latency.correction == first._latency.correction
    assert longer.net.conv1.weight.shape == part.net.conv1.weight.shape


CONFIG = """
model: {class_path: tests.support.models.Classifier, init_args: {width: 32}}
data: {class_path: tests.cli.test_lightning_cli.Data}
trainer: {max_epochs: 3, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


def test_a_table_of_another_machine_prunes_for_it(trainer, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert main(["latency-table", "-c", "config.yaml", "--path", "t.json", "--threads", "1"]) == 0
    assert "t.json: 1 groups of channels in onnxruntime, fp32" in capfd.readouterr().out
    recorded = LatencyTable.read("t.json")
    assert recorded.engine_version
    # Another machine, on which 24 channels are as slow as 32 and 16 are a third: no measurement here says so.
    slow = {n: 1.0 if n > 16 else 0.33 for n in recorded.ratios["net.conv1"]}
    foreign = LatencyTable(**{**recorded.to_dict(), "cpu": "other", "ratios": {"net.conv1": slow}, "together": []})
    foreign.write("foreign.json")
    module = Classifier(width=32)
    trainer(la.ChannelPruning(latency_reduction=2.0, latency_table="foreign.json", start=0, end=0), max_epochs=1).fit(
        module, wide()
    )
    assert module.net.conv1.weight.shape[0] == 16
    for arguments, says in (
        ({"latency_table": "foreign.json", "batch": 2}, "must be of engine 'onnxruntime' and batch 2"),
        ({"latency_table": "none.json"}, "which isn't there"),
    ):
        with pytest.raises(la.LightningAccelError, match=says):
            trainer(la.ChannelPruning(latency_reduction=2.0, end=0, **arguments), max_epochs=1).fit(
                Classifier(32), wide()
            )
    other = la.ChannelPruning(latency_reduction=2.0, latency_table="foreign.json", end=0)
    with pytest.raises(la.LightningAccelError, match=r"without its groups `net.conv1` \(64 units\)"):
        trainer(other, max_epochs=1).fit(Classifier(64), wide())


def test_int8_needs_a_table_of_int8(trainer, tmp_path):
    quantizing = la.QuantizationAwareTraining("onnxruntime", start=1)
    with pytest.raises(
        la.LightningAccelError, match="`latency_table` must be given where the network is quantized afterwards"
    ):
        trainer(la.ChannelPruning(latency_reduction=1.5, end=0), quantizing, max_epochs=2).fit(Classifier(32), wide())
    own = trainer(la.ChannelPruning(pruning_ratio=0.5, round_to=16), max_epochs=1)
    made = la.record_latency_table(own, Classifier(32), Data(), tmp_path / "t.json", target="onnxruntime", threads=1)
    assert made.precision == "onnxruntime"
    assert list(made.ratios["net.conv1"]) == [16]
    half = made.ratios["net.conv1"][16]
    LatencyTable(**{**made.to_dict(), "ratios": {"net.conv1": {16: min(half, 0.6)}}, "together": []}).write(
        tmp_path / "t.json"
    )
    module = Classifier(32)
    pruning = la.ChannelPruning(latency_reduction=1.5, end=0, round_to=16, latency_table=tmp_path / "t.json")
    trainer(pruning, la.QuantizationAwareTraining("onnxruntime", start=1), max_epochs=2).fit(module, wide())
    assert module.net.conv1.weight.shape[0] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency_reduction": 2.0, "macs_reduction": 2.0}, "Exactly one of"),
        ({"latency_reduction": 1.0}, "`latency_reduction` must be a factor above 1, but got 1.0"),
        ({"latency_reduction": 2.0, "engine": "pytorch"}, "`engine` must be one that runs ONNX files"),
        ({"macs_reduction": 2.0, "latency_table": "t.json"}, "`latency_table` must come with `latency_reduction`"),
        ({"latency_reduction": 2.0, "batch": 0}, "`batch` must be at least 1"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        la.ChannelPruning(**arguments)


def test_the_speed_is_that_of_the_file_that_ships(tmp_path):
    """A network that gets 4x fewer MACs: what the fast exporter's files measure is what those of the bundle do."""
    runners = []
    for width in (32, 8):
        net, x = Classifier(width).net.eval(), torch.randn(2, 3, 8, 8)
        own, fast = tmp_path / f"own{width}.onnx", tmp_path / f"fast{width}.onnx"
        la.export_onnx(net, x, own)
        FloatFiles(net, "", ((x,), {}), [], 64)({}, fast)
        runners += [la.load_runner(own, "onnxruntime", threads=1), la.load_runner(fast, "onnxruntime", threads=1)]
    feeds = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    times = _in_turns([lambda r=r: r.run({r.input_names[0]: feeds}) for r in runners])
    own, fast = (float(np.median(times[i] / times[i + 2])) for i in (0, 1))
    assert fast == pytest.approx(own, rel=0.3)  # a busy machine
