"""Five lines of advice."""

import lightning as L

from lightning_accel.cli.main import main
from lightning_accel.planning.compression.advice import lines_of
from lightning_accel.planning.compression.floor import Smallest
from lightning_accel.planning.compression.ladder import FAILED, Result
from lightning_accel.planning.compression.recipe import Recipe
from tests.cli.test_lightning_cli import _process, pytestmark  # noqa: F401 - the fixture and marks serve here too
from tests.planning.compression.test_candidates import candidate
from tests.planning.compression.test_compress import CONFIG, QUIET
from tests.support.models import Classifier

FLOAT = Recipe("float", ("onnxruntime", "openvino"))
INT8 = Recipe("ptq", ("openvino",), "openvino", "low")
SMALLEST = [Smallest("openvino", "openvino", 0.1, 0.1, 300)]


def test_the_advice_follows_the_measurements():
    floats = Result(FLOAT, candidates=[candidate(0.0, 4.0, 4000), candidate(0.0, 3.0, 4000, engine="openvino")])
    good = Result(INT8, candidates=[candidate(0.1, 1.0, engine="openvino")])
    engine, int8, training, channels, following = lines_of(floats, [good], SMALLEST, 0.5, 1)
    assert engine.startswith("Engine: float32 is fastest in openvino: 3.000 ms")
    assert int8.startswith("Int8: fastest in openvino: 1.000 ms, 3.00x the fastest float32")
    assert training == "Training: not needed for int8: it loses 0.10 points, and 0.5 are acceptable."
    assert channels.startswith("Channels: ChannelPruning can reach 0.100 ms and 300 bytes")
    assert "quantize --target openvino --effort low --engine openvino" in following
    assert "compress --max-drop 0.5 --max-latency-ms 0.5 --batch 1" in following

    bad = Result(INT8, candidates=[candidate(3.0, 1.0, engine="openvino")])
    lines = lines_of(floats, [bad], SMALLEST, 0.5, 1)
    assert "loses 3.00 [2.80, 3.20] points of accuracy, more than 0.5: QuantizationAwareTraining" in lines[2]
    assert (
        lines[4]
        == "Next: for half of the latency: lightning-accel compress --max-drop 0.5 --max-latency-ms 1.5 --batch 1."
    )

    none = Result(INT8, FAILED, "no kernels")
    assert lines_of(floats, [none], SMALLEST, 0.5, 1)[1] == "Int8: the network can't be quantized: no kernels."


def test_the_command_prints_five_lines(tmp_path, capfd):
    trainer = L.Trainer(
        max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, limit_val_batches=0, **QUIET
    )
    from tests.cli.test_lightning_cli import Data

    trainer.fit(Classifier(width=32, lr=0.02), Data(train=64))
    trainer.save_checkpoint("x.ckpt")
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert (
        main(["advise", "-c", "config.yaml", "--ckpt-path", "x.ckpt", "--engine", "onnxruntime", "--max-drop", "5"])
        == 0
    )
    lines = capfd.readouterr().out.strip().splitlines()[-5:]
    assert [line.partition(":")[0] for line in lines] == ["Engine", "Int8", "Training", "Channels", "Next"]
