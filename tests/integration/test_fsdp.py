"""FSDP2 on two gloo processes equals one process: masks, losses, weights, ranges, bundles, and resumes on another number of ranks."""

import json

import pytest
import torch

import lightning_accel as la
from tests.support.ranks import torchrun
from tests.support.sharded import Batches, Net
from tests.support.sharded_runs import resumed, run

RUNS = ("pruned", "taylor", "quantized", "distilled", "sharded teacher", "all", "shipped")
SCRIPT = """
import sys, torch
from pathlib import Path
from tests.support.sharded_runs import exact, resumed, run
torch.set_num_threads(1)
folder, step = Path(sys.argv[1]), sys.argv[2]
if step == "runs":
    found = {name: run(name, folder, 2) for name in sys.argv[3:]}
elif step == "exact":
    found = exact(folder, 2)
else:
    found = {epoch: resumed(2, folder / f"1_{epoch}.ckpt") for epoch in (0, 1)}
if torch.distributed.get_rank() == 0:
    torch.save(found, folder / f"{step}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # a thread of gloo that outlives the interpreter aborts the process
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks and one process end with: six runs each."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = torchrun(SCRIPT, folder, str(folder), "runs", *RUNS, seconds=150)
    assert done.code == 0, done.text[-3000:]
    torch.save({name: run(name, folder, 1) for name in RUNS}, folder / "one.pt")
    return folder


def both(folder, name):
    return (torch.load(folder / file, weights_only=False)[name] for file in ("one.pt", "runs.pt"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(folder, name):
    one, two = both(folder, name)
    assert one["unfinished"] == two["unfinished"] == ""
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-6)
    assert len(one["losses"]) == 12
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-6, msg=key)
    assert one["masks"].keys() == two["masks"].keys()
    assert all(torch.equal(mask, two["masks"][key]) for key, mask in one["masks"].items())
    for path, ranges in one["ranges"].items():
        for first, second in zip(ranges, two["ranges"][path], strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    assert bool(one["masks"]) == (name in ("pruned", "taylor", "all", "shipped"))
    assert (one["teacher_sharded"], two["teacher_sharded"]) == (False, name == "sharded teacher")
    assert bool(one["ranges"]) == (name in ("quantized", "all", "shipped"))


def test_the_bundle_of_two_ranks_is_that_of_one_process_with_its_weights(folder):
    held_out, again = Batches().val_dataloader(), folder / "again"
    la.export_bundle(folder / "bundle2.ckpt", held_out, again, cls=Net, engines=["onnxruntime"], samples=16)
    manifest = json.loads((folder / "bundle2" / "manifest.json").read_text())
    assert manifest["complete"]
    names = sorted(path.name for path in (folder / "bundle2").rglob("*.onnx"))
    assert names
    for name in names:
        (first,), (second,) = ((folder / of).rglob(name) for of in ("bundle2", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    engine = la.load_runner(folder / "bundle2")
    assert engine(held_out.dataset.tensors[0].numpy()).shape == (32, 5)


@pytest.mark.timeout(240)
def test_checkpoints_resume_on_another_number_of_ranks(folder):
    one, two = both(folder, "all")
    done = torchrun(SCRIPT, folder, str(folder), "resumes", seconds=120)
    assert done.code == 0, done.text[-3000:]
    on_two = torch.load(folder / "resumes.pt", weights_only=False)
    for epoch in (0, 1):
        on_one = resumed(1, folder / f"2_{epoch}.ckpt")
        for found in (on_one, on_two[epoch]):
            assert found["unfinished"] == ""
            torch.testing.assert_close(found["losses"], one["losses"][4 * (epoch + 1) :], rtol=0, atol=1e-5)
            assert all(torch.equal(mask, found["masks"][key]) for key, mask in two["masks"].items())
            for key, weight in one["weights"].items():
                torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-5, msg=key)


@pytest.mark.timeout(240)
def test_exact_resume_goes_on_bit_for_bit_within_an_epoch(tmp_path):
    done = torchrun(SCRIPT, tmp_path, str(tmp_path), "exact", seconds=150)
    assert done.code == 0, done.text[-3000:]
    found = torch.load(tmp_path / "exact.pt", weights_only=False)
    whole = found.pop(0)
    assert len(whole["losses"]) == 12
    for after, rest in found.items():
        assert rest["losses"] == whole["losses"][after:], after
        assert all(torch.equal(weight, rest["weights"][key]) for key, weight in whole["weights"].items()), after
        assert all(torch.equal(mask, rest["masks"][key]) for key, mask in whole["masks"].items()), after
