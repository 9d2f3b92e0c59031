"""Networks of timm and transformers under each callback, trained 20 steps beside plain Lightning: is any of them trained differently?

Until a callback begins to act, a run with it must be the plain run: every loss the same (to 1e-6, where attention
is computed in parts; else to the last bit). `quantized` calibrates
through the first epoch, then trains with fake-quantization; `weights` and `channels` begin in the second epoch. What is refused must be
refused by an error of this library.

    python -m experiments.any_network --minutes 30             # what is missing, in the environment of `make zoo`
    python -m experiments.any_network --networks bert resnet10t --quick
    python -m experiments.any_network --table

A line of `experiments/results/any_network.jsonl`: `difference`: largest of the losses before the callback acts; `done`: what it did
in the end (operators in int8, share of zeros, share of parameters that are left); `step`: its time of a step over the plain one's,
noisy, from one run.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "any_network.jsonl"
COLUMNS = ("quantized", "weights", "channels")
_STEPS = 10  # in an epoch; there are two
_BATCH = 4

TIMM = (
    "resnet10t", "resnet18d", "resnext26ts", "seresnext26ts", "skresnet18", "res2net50_14w_8s", "resnest14d",
    "cspresnet50", "dla34", "densenet121", "hrnet_w18_small", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "efficientnet_lite0", "tf_efficientnet_b0", "mixnet_s", "mnasnet_small", "fbnetc_100", "ghostnet_050",
    "lcnet_050", "tinynet_e", "regnetx_002", "regnety_002", "repvgg_a0", "mobileone_s0", "vgg11", "selecsls42",
    "xception41", "nf_regnet_b0", "dm_nfnet_f0", "gernet_s", "convnext_atto", "convnextv2_atto", "edgenext_xx_small",
    "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_224", "poolformer_s12", "swin_tiny_patch4_window7_224",
    "coat_lite_tiny", "crossvit_tiny_240", "levit_128s", "efficientformer_l1", "mobilevit_xxs", "mobilevitv2_050",
    "fastvit_t8", "repvit_m0_9", "inception_next_atto", "rexnet_100", "tiny_vit_5m_224", "visformer_tiny",
    "hgnet_tiny",
)  # fmt: skip
TEXT = (
    "bert", "roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "gpt2", "gpt_neo", "opt", "llama",
    "qwen2", "mistral", "phi", "gemma", "bloom", "xlnet", "squeezebert",
)  # fmt: skip
_SIZES = {  # of a tiny configuration, by the names that the families use
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_inner"), 64),
    "vocab_size": 100,
    "head_dim": 8,
    "attention_types": [[["global", "local"], 1]],
    "pad_token_id": 0,
    "num_labels": 10,
}


def network(name: str) -> tuple[Any, Any]:
    """A network by name, with random weights, and one sample's input: `(C, H, W)`, or tokens `(L,)`."""
    import torch

    if name in TEXT:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        known = AutoConfig.for_model(name)
        config = AutoConfig.for_model(name, **{k: v for k, v in _SIZES.items() if hasattr(known, k)})
        return AutoModelForSequenceClassification.from_config(config), torch.randint(1, 100, (16,))
    import timm

    for options, pixels in (({"img_size": 64}, 64), ({}, 64), ({}, timm.get_pretrained_cfg(name).input_size[-1])):
        try:
            made = timm.create_model(name, num_classes=10, **options)
            made.eval()(torch.zeros(1, 3, pixels, pixels))
        except (TypeError, AssertionError, RuntimeError, ValueError):  # it takes no `img_size`, or not this one
            continue
        return made, torch.zeros(3, pixels, pixels)
    raise RuntimeError(f"{name} takes no image")


def run(name: str, column: str | None, seed: int) -> dict[str, Any]:
    """Train a network, with a callback or without, and return its losses, times and what was done."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_accel as la
    from lightning_accel.quantization.graph.prepare import quantized_forwards

    torch.manual_seed(seed)
    made, sample = network(name)
    count, text = _BATCH * _STEPS, name in TEXT
    x = torch.randint(1, 100, (count, *sample.shape)) if text else torch.randn(count, *sample.shape)
    data = TensorDataset(x, torch.randint(0, 10, (count,)))

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = made
            self.losses: list[float] = []  # the module's own: trial runs are made on copies
            self.times: list[float] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.network(x)
            return out.logits if text else out

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.times.append(time.perf_counter())
            out = self(batch[0])
            loss = torch.nn.functional.cross_entropy(out[0] if isinstance(out, tuple) else out, batch[1])
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    callbacks: dict[str | None, Callable[[], list[Any]]] = {
        None: list,
        "quantized": lambda: [la.QuantizationAwareTraining("onnxruntime", start=0, calibration_batches=_STEPS)],
        "weights": lambda: [la.WeightPruning(0.5, start=1, end=1)],
        "channels": lambda: [la.ChannelPruning(0.3, start=1, end=1)],
    }
    module = Module()
    before = sum(p.numel() for p in module.parameters())
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=callbacks[column](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    torch.manual_seed(seed)
    trainer.fit(module, DataLoader(data, _BATCH))
    done: float = 0
    if column == "quantized":
        done = len(quantized_forwards(module)[""].quantized)
    elif column == "weights":
        done = float(trainer.callback_metrics["sparsity"])
    elif column == "channels":
        done = sum(p.numel() for p in module.parameters()) / before
    gaps = [b - a for a, b in pairwise(module.times)]
    finite = all(loss == loss and abs(loss) < 1e6 for loss in module.losses)
    return {"losses": module.losses, "step": statistics.median(gaps[_STEPS:]), "done": done, "finite": finite}


def compare(name: str, seed: int) -> dict[str, dict[str, Any]]:
    """The columns of a network: outcome, difference to the plain run, what was done."""
    from lightning_accel.errors import LightningAccelError

    plain = run(name, None, seed)
    found: dict[str, dict[str, Any]] = {}
    for column in COLUMNS:
        try:
            it = run(name, column, seed)
        except LightningAccelError as error:
            found[column] = {"outcome": "refused", "reason": str(error)[:400]}
            continue
        except Exception as error:  # whatever else it raises is what the experiment looks for
            found[column] = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
            continue
        # Quantization learns ranges from the first ten batches and acts from the eleventh on; the others begin with it.
        pairs = list(zip(plain["losses"], it["losses"], strict=True))[:_STEPS]
        difference = max(abs(a - b) for a, b in pairs)
        good = difference <= 1e-6 and (it["finite"] or not plain["finite"])
        found[column] = {
            "outcome": "same" if good else "different",
            "difference": difference,
            "done": round(it["done"], 4),
            "step": round(it["step"] / plain["step"], 3),
        }
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each network."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault(line["network"], {})[line["column"]] = line
    shown = ["| network | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, cells in rows.items():
        texts = [
            f"{cell['outcome']} ({cell['done']:g})" if "done" in cell else f"{cell['outcome']}: {cell['reason'][:80]}"
            for cell in (cells[column] for column in COLUMNS if column in cells)
        ]
        shown.append(f"| {name} | " + " | ".join(texts) + " |")
    counts = dict.fromkeys(("same", "refused", "different", "failed"), 0)
    for line in lines:
        counts[line["outcome"]] += 1
    return "\n".join([*shown, "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items())])


def recorded() -> list[dict[str, Any]]:
    """The lines so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def main() -> None:
    """Run what is missing, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[*TEXT, *TIMM])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--quick", action="store_true", help="print, and write nothing")
    parser.add_argument("--table", action="store_true", help="print what is known")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(recorded()))
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)
    from lightning_accel.benchmarking.environment import environment

    began, about = time.monotonic(), environment()
    known = set() if arguments.quick else {(line["network"], line["seed"]) for line in recorded()}
    for name in arguments.networks:
        if (name, arguments.seed) in known or time.monotonic() - began > 60 * arguments.minutes:
            continue
        for column, cell in compare(name, arguments.seed).items():
            line = {"row": f"{name} / {column}", "network": name, "column": column, "seed": arguments.seed, **cell}
            print(json.dumps(line), flush=True)
            if not arguments.quick:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as out:
                    out.write(json.dumps({**line, "environment": about}) + "\n")


if __name__ == "__main__":
    main()
