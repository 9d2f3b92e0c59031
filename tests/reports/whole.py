"""A report with every section, by hand, and a reader that finds what is wrong with a page."""

from html.parser import HTMLParser

from lightning_accel.reports.model import BENEFIT, CHANNELS, METHOD, QAT_BENEFIT, SPARSITY, LayerTable, Note, Report

NASTY = '<script>alert("x")</script> & "quotes"'


def comparison() -> dict:
    """Variants as a bundle's ``comparison.json`` has them: two that ran, two that didn't."""
    point = {"p90_ms": 0.5, "p99_ms": 0.8, "rounds": 5, "calls": 500}
    fp32 = {
        "name": "onnxruntime fp32",
        "engine": "onnxruntime",
        "precision": "fp32",
        "status": "ran",
        "reason": "",
        "file_bytes": 8398,
        "peak_memory_bytes": 81_000_000,
        "first_ms": 12.1,
        "accuracy": 0.906,
        "agreement": 1.0,
        "samples": 256,
        "points": [
            {
                **point,
                "batch": 1,
                "callers": callers,
                "p50_ms": 0.4,
                "throughput": 2500.0 * callers,
                "speedup": 1.0,
                "speedup_low": 1.0,
                "speedup_high": 1.0,
            }
            for callers in (1, 4)
        ],
    }
    int8 = {
        **fp32,
        "name": "openvino int8",
        "engine": "openvino",
        "precision": "int8",
        "file_bytes": 5529,
        "accuracy": 0.902,
        "agreement": 0.992,
        "points": [
            {**p, "p50_ms": 0.2, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1} for p in fp32["points"]
        ],
    }
    nothing = dict.fromkeys(("file_bytes", "peak_memory_bytes", "first_ms", "accuracy", "agreement", "samples"))
    return {
        "schema": 1,
        "environment": {"load_average": [0.4, 0.5, 0.6]},
        "settings": {
            "threads": 2,
            "batches": [1],
            "callers": [1, 4],
            "seconds": 1.0,
            "seed": 0,
            "data": "256 held-out samples",
            "agreement_with": "the trained network",
        },
        "baseline": "onnxruntime fp32",
        "null": {
            "points": [
                {"batch": 1, "callers": n, "value": 1.0, "low": 0.87, "high": 1.12, "waiting": None, "noisy": True}
                for n in (1, 4)
            ]
        },
        "noisy": True,
        "variants": [
            fp32,
            int8,
            {**fp32, **nothing, "name": "tensorrt fp16", "status": "not here", "reason": "no NVIDIA GPU", "points": []},
            {**fp32, **nothing, "name": "compile", "status": "out of time", "reason": "took over 20 s", "points": []},
        ],
        "decision": {
            "ship": "openvino int8",
            "why": "the fastest within 0.5 points of the baseline.",
            "budgets": {"max_drop": 0.5},
            "refused": {"onnxruntime fp32": "slower than openvino int8"},
        },
    }


def whole_report() -> Report:
    """Values for every section, with a name that would be markup if it weren't escaped."""
    row = {"engine": "onnxruntime", "total": 1000, "parameters": 272474, "file_bytes": 1101344}
    check = {
        "engine": "onnxruntime (its kernels)",
        "samples": 256,
        "median_error": 1e-8,
        "p99_error": 1.5e-3,
        "max_error": 1.9e-3,
        "agreement": 1.0,
        "tolerance": {"median": 0.01, "p99": 0.05, "maximum": 0.2, "agreement": 0.98, "metric": 0.01},
        "distribution": {"50.0%": 1e-8, "100.0%": 1.9e-3},
        "metric": {"val/accuracy": [0.97, 0.9691]},
        "passed": True,
    }
    return Report.from_dict(
        {
            "title": f"Net {NASTY}",
            "command": "lightning-accel export -c run.yaml --ckpt-path bundle.ckpt",
            "ships": "student int8",
            "verdict": {
                "why": "the fastest candidate that is not worse than float32 of the same network",
                "baseline": "teacher",
                "score": "accuracy",
                "change": -0.011,
                "low": -0.02,
                "high": -0.002,
                "good": True,
                "refused": {"student fp32": f"slower {NASTY}"},
            },
            "rows": [
                {**row, "name": "teacher", "correct": 981, "p50_ms": 4.21, "p90_ms": 4.9},
                {**row, "name": "student fp32", "correct": 975, "p50_ms": 2.0, "p90_ms": 2.2, "file_bytes": 80000}
                | {"speedup": 2.1, "speedup_low": 2.0, "speedup_high": 2.2},
                {"name": "student int8, not trained (PTQ)", "engine": "pytorch", "correct": 951, "total": 1000}
                | {"note": NASTY},
                {**row, "name": "student int8", "correct": 970, "p50_ms": 5.0, "p90_ms": 5.25, "file_bytes": 31200}
                | {"speedup": 0.842, "speedup_low": 0.8, "speedup_high": 0.881},
                {
                    "name": "student int8, tensorrt",
                    "engine": "tensorrt",
                    "file_bytes": 99999,
                    "note": "built here, not run",
                },
            ],
            "batch_size": 32,
            "threads": 2,
            "verification": [{**check, "engine": "file (as written)", "metric": {}}, check],
            "proofs": {"integers": {"integers": 1668, "weights": 3, "activations": 3, "nodes": 6}}
            | {"nodes": {"compared": 16, "of": 16, "largest_error": 1.4e-7}},
            "engines": [
                {
                    "engine": "onnxruntime",
                    "status": "verified and measured here",
                    "file": "model.onnx",
                    "runs_here": True,
                },
                {
                    "engine": "tensorrt",
                    "status": "built here, not run",
                    "file": "engines/model.engine",
                    "runs_here": False,
                    "command": "trtexec --onnx=model.onnx",
                },
            ],
            "layers": [
                LayerTable(SPARSITY, "weights", {"body.0.weight": 0.25, NASTY: 0.75}, 0.5),
                LayerTable(CHANNELS, "channels", {"body.0": "16 -> 12"}, "2,884 -> 1,732 parameters"),
                LayerTable(BENEFIT, "", {"WeightPruning (weights)": "smaller when compressed"}),
            ],
            "quantization": {"body.0": "int8", "lstm": "float: no integer kernel"},
            "timeline": [
                {"phase": "WeightPruning.weights", "start": 0, "end": 20},
                {"phase": "QuantizationAwareTraining.qat", "start": 30, "end": None},
            ],
            "curves": [
                {"epoch": e, "step": 10 * (e + 1), "metrics": {"val/accuracy": 0.5 + e / 10, NASTY: 1.0}}
                for e in range(4)
            ],
            "run": {"command": "lightning-accel fit -c run.yaml", "config": "model:\n  class_path: pkg.Net # <b>\n"},
            "failed": [
                {"engine": "openvino", "step": "load", "reason": "no such operator.", "replaced_by": "onnxruntime"}
            ],
            "phases": ["WeightPruning.weights: from step 0 to 20, of 40"],
            "benchmark": {"null_ratio": [0.8, 1.2], "rounds": 200, "noisy": True},
            "environment": {"cpu": "AMD EPYC", "cpu_flags": {"avx2": True}, "cores": 2, "gpu": None},
            "notes": [
                Note(METHOD, "Verified on 256 samples of the validation loader."),
                Note(QAT_BENEFIT, "Quantization-aware training earned its cost: +1.9."),
            ],
            "comparison": comparison(),
        }
    )


class Page(HTMLParser):
    """What a page is made of; ``problems`` lists what is wrong with it."""

    VOID = ("meta", "link", "br", "hr", "img", "col")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.hrefs, self.problems = [], [], [], []
        self.elements: list[tuple[str, dict]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        self.problems += [f"<{name}> is not closed" for name in self.open]
        self.problems += [f"id {i} twice" for i in {i for i in self.ids if self.ids.count(i) > 1}]
        self.problems += [f"link to {h}" for h in self.hrefs if h[1:] not in self.ids]

    def handle_starttag(self, name, attrs):
        given = dict(attrs)
        if len(given) != len(attrs):
            self.problems.append(f"<{name}> has an attribute twice")
        self.elements.append((name, given))
        if name in ("script", "iframe", "object", "embed", "base", "form") or (
            name == "img" and not dict(attrs).get("src", "").startswith("data:image/png;base64,")
        ):
            self.problems.append(f"<{name}>")
        for key, value in given.items():
            if key.startswith("on") or "javascript:" in (value or ""):
                self.problems.append(f"{key} of <{name}>")
            if key in ("src", "href", "srcset", "data", "action", "xlink:href") and not value.startswith(
                ("#", "data:")
            ):
                self.problems.append(f"{key}={value}")
            if "url(" in (value or ""):
                self.problems.append(f"{key}={value}")
        if "id" in given:
            self.ids.append(given["id"])
        if name == "a":
            self.hrefs.append(given["href"])
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.problems.append(f"</{name}> closes nothing")

    def handle_data(self, data):
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)
        if self.open and self.open[-1] == "style" and ("url(" in data or "@import" in data):
            self.problems.append("the style fetches something")

    def all(self, name: str) -> list[dict]:
        return [given for found, given in self.elements if found == name]
