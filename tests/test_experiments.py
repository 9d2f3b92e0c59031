"""The scripts run and print what they claim last; no time is asserted, since a busy machine would make it wrong."""

import json
import re

import pytest
import scipy.stats

from experiments.trials import interval, paired, run_trials
from tests.support.forked import run_module

pytestmark = pytest.mark.timeout(900)  # several scripts in a row, on a machine that may be slow or busy
RATIO = r"\d+\.\d{4} \[\d+\.\d{4}, \d+\.\d{4}\]"


@pytest.mark.parametrize(
    ("script", "target", "says"),
    [
        ("idle_overhead", "1.01", "weights after 16 steps with idle callbacks and without: bit-identical"),
        ("qat_step", "1.25", "ResNet-8 w16, torch.ao FX: p50"),
        ("pruning_step", "1.03", "global mask update of 1 M weights"),
        ("distill_step", "1.02", "online step / (cross-entropy step + the teacher's forward)"),
    ],
)
def test_benchmark(script, target, says):
    process = quick(script)
    lines = process.stdout.splitlines()
    assert any(line.startswith("cpu: ") for line in lines)
    assert any(line.startswith(says) for line in lines)
    assert re.search(rf"null run .*: {RATIO}", process.stdout)
    assert re.fullmatch(rf".+: {RATIO} \(target: at most {target}, (reached|missed)\)", lines[-1])


def quick(script, *options):
    process = run_module(f"experiments.{script}", "--quick", *options)
    assert process.returncode == 0, process.stderr
    return process


def test_the_bytes_of_a_mask_update_do_not_grow_with_the_parameters():
    lines = [
        line for line in quick("scaling", "--only", "bytes").stdout.splitlines() if re.match(r"\| [\d,]+ \|", line)
    ]
    assert [line.split(" | ")[1:3] for line in lines] == [["5", "8,288"]] * 2


def test_int8_in_engines_and_in_training():
    lines = quick("int8_zoo").stdout.splitlines()
    assert sum(line.startswith(("| CNN w32 |", "| ResNet-8 w16 |")) for line in lines) == 2
    verdict = r"geometric mean .* over 2 networks: \d+\.\d+x \(target: at least 1.5, (reached|missed)\)"
    assert any(re.fullmatch(verdict, line) for line in lines)
    assert lines[-1].startswith("| BERT-like w128 |")
    assert lines[-1].count(" [") == 6  # the variants of the second table beside the first's
    lines = quick("decision_zoo").stdout.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| CNN w32 |", "| ResNet-8 w16 |"))]
    assert [row[2] in ("onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino int8") for row in rows] == [
        True
    ] * 2
    assert re.fullmatch(r"decisions slower than .*: \d of 2 \(target: 0, (reached|missed)\)", lines[-1])
    verdict = r"default comparison of CNN w32: \d+ s \(\d+; target: at most 180 s, (reached|missed)\)"
    assert re.fullmatch(verdict, quick("comparison_time").stdout.splitlines()[-1])
    lines = quick("qat_fashion").stdout.splitlines()
    assert lines[-1].startswith("QAT - float, target at least -0.1 points")
    rows = [json.loads(line) for line in lines if line.startswith('{"row"')]
    assert [row["row"] for row in rows] == ["ResNet-8 w16", "depthwise"]
    assert all({"float", "PTQ", "QAT"} <= row.keys() for row in rows)
    assert quick("qat_fashion", "--tried").stdout.splitlines()[-1].startswith("depthwise, QAT, batch norm frozen: loss")


def test_every_difference_of_a_file_is_traced():
    """No time in it: this is the claim itself, on fewer samples."""
    lines = quick("fidelity").stdout.splitlines()
    assert lines[-1].endswith(": reached"), lines


def test_integer_kernels_compute_what_was_prepared():
    lines = quick("int8_kernels").stdout.splitlines()
    assert sum(line.startswith(("| ResNet-8 w16 |", "| depthwise |")) for line in lines) == 8
    assert lines[-1].startswith("largest difference: ")


def test_everything_at_once():
    lines = quick("joint_fashion", "--rows", "all").stdout.splitlines()
    row = next(json.loads(line) for line in lines if line.startswith('{"row": "all"'))
    assert row["parameters"] < 77_754 / 3  # of the network before channels left
    assert row["smaller"] > 30  # and what is left is integers
    assert lines[-1].startswith("faster, smaller, share of accuracy: ")


def test_trainings():
    process = quick("prune_fashion")
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"row"')]
    sparsity = {row["row"]: row["sparsity"] for row in rows}
    assert list(sparsity) == [
        "dense",
        "WeightPruning",
        "WeightPruning to epoch 4",
        "Lightning ModelPruning",
        "torch.nn.utils.prune",
    ]
    assert sparsity["dense"] == 0
    assert sparsity["WeightPruning"] == sparsity["torch.nn.utils.prune"] > 0.79
    assert process.stdout.splitlines()[-1].startswith("WeightPruning - dense: ")


def test_a_stopped_series_of_trainings_goes_on(tmp_path):
    ran = []

    def trial(seed):
        ran.append(seed)
        return {"accuracy": 90.0 + seed}

    file, rows = tmp_path / "x.jsonl", {"a": trial, "b": trial}
    run_trials(file, rows, (1, 2), {"epochs": 1}, minutes=0)
    assert ran == [1]
    lines = run_trials(file, rows, (1, 2), {"epochs": 1})
    assert ran == [1, 1, 2, 2]
    assert len(lines) == 4
    assert run_trials(file, rows, (1,), {"epochs": 2}) != lines  # other settings are another series
    assert paired(lines, "b", "a", "accuracy") == [0.0, 0.0]


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    low, high = scipy.stats.t.interval(0.95, 2, loc=mean, scale=scipy.stats.sem([1.0, 2.0, 4.0]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_distill_fashion():
    """Each loss is trained once; the last line says whether the best beats cross-entropy."""
    lines = quick("distill_fashion").stdout.splitlines()
    for row in ("KD", "DKD", "DIST", "KD, standardized", "hint", "attention"):
        assert any(line.startswith(f"| {row} | 1 |") for line in lines), row
    assert re.fullmatch(
        r".+ - cross-entropy: .+ points \(target: above 0 beyond the interval, (reached|missed)\)", lines[-1]
    )


@pytest.mark.parametrize(
    ("script", "last"),
    [
        ("engine_zoo", r"engines built in fp32, fp16 and int8: 3 of 3 \(target: all, reached\)"),
        ("found_faults", r"faults found: 8 of 8, Polygraphy \d \(target: all, and no false alarm, reached\)"),
        ("export_time", r"export and proof, the slower of both: \d+\.\d s \(target: at most 20 s, (reached|missed)\)"),
    ],
)
def test_exports(script, last):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    lines = quick(script).stdout.splitlines()
    assert any(line.startswith("cpu: ") for line in lines)
    assert re.fullmatch(last, lines[-1])


@pytest.mark.parametrize(
    ("script", "last"),
    [
        ("null_divergence", r"false alarms: 0 of \d+ right files and engines \(target: 0, reached\)"),
        ("faults_at_size", r"faults found: (\d+) of \1 \(target: all, and no false alarm, reached\)"),
        (
            "bundle_time",
            r"ResNet-18, quarter width at 96 pixels, to a proven bundle: \d+ s, .* MB \(target: .*, (reached|missed)\)",
        ),
    ],
)
def test_proofs_at_size(script, last):
    lines = quick(script).stdout.splitlines()
    assert any(line.startswith("cpu: ") for line in lines)
    assert re.fullmatch(last, lines[-1])


def test_serving():
    lines = quick("serving").stdout.splitlines()
    assert sum(": 0 of " in line and "innocent requests failed" in line for line in lines) == 4
    assert "rows that are no result of the runner at batch 1 or 16: 0; requests without an answer: 0" in lines
    assert re.fullmatch(r"p99 at 8 clients: \d+\.\d+x of p50 \(target: at most 3, (reached|missed)\)", lines[-1])


def test_bulk():
    line = quick("bulk").stdout.splitlines()[-1]
    assert line == "of 20,000 rows lost: 0, doubled: 0 (target: 0 and 0, with one worker killed, reached)"


def test_language_models(tmp_path):
    for package in ("transformers", "gguf", "compressed_tensors", "peft"):
        pytest.importorskip(package, reason="the extra `lm` is not installed")
    lines = quick("language_models", "--folder", str(tmp_path)).stdout.splitlines()
    found = {
        line.partition(": ")[0]: json.loads(line.partition(": ")[2])
        for line in lines
        if re.match(r"(grids|adapters): ", line)
    }
    assert found["adapters"]["inside the grid"] == 0.0 < found["adapters"]["over a rounded base"]
    assert found["grids"]["signed extreme / -8 (here)"] == {"gguf": 1.0, "onnxruntime": 1.0}
    assert found["grids"]["largest / 7"]["gguf"] < 0.6
    assert re.fullmatch(
        r"loss of perplexity, distilled / rounded, 1 seeds: .* \(target: at most 0.5, (reached|missed)\)", lines[-2]
    )
    assert re.fullmatch(r"step of LoRA .*: \d+\.\d{3} \(target: at most 1.15, (reached|missed)\)", lines[-1])


def test_channels_for_latency():
    lines = quick("latency_pruning").stdout.splitlines()
    assert any(line.startswith("as fast by MACs, measured: ") for line in lines)
    assert sum(line.startswith(("| latency_reduction | 1 |", "| macs_reduction | 1 |")) for line in lines) == 2
    assert re.fullmatch(
        r"farthest latency from 1.8 times: \d+\.\d% \(target: at most 10%, (reached|missed)\)", lines[-1]
    )
