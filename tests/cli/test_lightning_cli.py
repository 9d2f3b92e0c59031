"""The command line, through its real parser, on real (tiny) runs."""

import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.cli.lightning_cli import AccelCLI
from lightning_accel.cli.main import main
from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS
from lightning_accel.engines.registry import register_engine, unregister_engine
from lightning_accel.export.logging import scalars
from lightning_accel.reports.model import Report, Row
from tests.support.models import Classifier, images
from tests.support.reference_engine import UNLOADABLE

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 has renamed.
    pytest.mark.filterwarnings(r"ignore:\s+By default only one JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s+``ArgumentParser.add_instantiator`` was deprecated"),
    pytest.mark.filterwarnings(r"ignore:\s+``instantiate_classes`` was deprecated"),
    pytest.mark.filterwarnings(r"ignore:\s+skip_none parameter was deprecated"),
]

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "configs" / "sweep.yaml"  # of W&B, not of the Trainer
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path != SWEEP)
WHOLE = [path for path in CONFIGS if "model" in yaml.safe_load(path.read_text())]
OVERLAYS = [path for path in CONFIGS if path not in WHOLE]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


class Data(L.LightningDataModule):
    """Tiny images, all parts."""

    def __init__(self, held_out: int = 64, train: int = 64):
        super().__init__()
        self.held_out, self.train = held_out, train

    def train_dataloader(self):
        return DataLoader(images(self.train), 8, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(images(self.held_out, seed=1), 32)

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return DataLoader([x for x, _ in images(self.held_out, seed=1)], batch_size=32)


class TrainingData(L.LightningDataModule):
    """Nothing held out."""

    def train_dataloader(self):
        return DataLoader(images(64), 8)


class Branching(Classifier):
    """A forward whose way depends on the values of its input: no graph holds it."""

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


class FiveClasses(torch.nn.Module):
    """A teacher of another task."""

    def forward(self, x):
        return x.new_zeros(len(x), 5)


@pytest.fixture(autouse=True)
def _process(monkeypatch, tmp_path):
    """Arguments, search path, folder and seed of the process are as they were afterwards."""
    monkeypatch.setattr(sys, "argv", ["lightning-accel"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.chdir(tmp_path)


def printed(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def config_of(capsys, *args) -> dict:
    return yaml.safe_load(printed(capsys, *args))


# --- the configs that ship


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_begins_with_its_launch_command_and_parses(capsys, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# lightning-accel fit ")
    words = first.split()[3:]
    assert words[-1] == f"configs/{path.name}"
    config = config_of(capsys, *words)
    assert config["model"]["class_path"]


def test_every_overlay_is_tried():
    assert {path.stem for path in OVERLAYS} >= {"prune", "wandb", "resume"}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_add_to_the_quickstart_and_take_nothing_away(capsys, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    base = config_of(capsys, "-c", str(QUICKSTART))
    both = config_of(capsys, "-c", str(QUICKSTART), "-c", str(path))
    callbacks = base["trainer"].pop("callbacks")
    assert both["trainer"]["callbacks"][: len(callbacks)] == callbacks
    added = yaml.safe_load(path.read_text())["trainer"]
    assert len(both["trainer"]["callbacks"]) == len(callbacks) + len(added.get("callbacks+", []))
    assert (both["model"], both["data"]) == (base["model"], base["data"])
    changed = {key for key, value in base["trainer"].items() if both["trainer"][key] != value}
    assert changed == {key for key in added if key != "callbacks+"}


def test_overlays_compose_with_each_other_and_with_the_command_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for path in [QUICKSTART, *OVERLAYS] for word in ("-c", str(path))]
    config = config_of(capsys, *words, "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor")
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    quickstart = ["ChannelPruning", "WeightPruning", "QuantizationAwareTraining", "ModelExport"]
    assert sorted(names) == sorted(
        [*quickstart, "WeightPruning", "ExactResume", "ModelCheckpoint", "LearningRateMonitor"]
    )
    assert config["trainer"]["logger"]["init_args"]["offline"] is True


@pytest.mark.parametrize("end", [0, -1])
def test_the_sweep_is_a_command_line_that_parses(capsys, monkeypatch, end):
    """As W&B's agent makes it: the macros replaced, one option for each parameter, its smallest or largest value."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["program"] == "lightning-accel"
    values = {name: of.get("values", [of.get("min"), of.get("max")])[end] for name, of in sweep["parameters"].items()}
    options = [f"--{name}={value}" for name, value in values.items()]
    program, command, *words = (w for word in sweep["command"] for w in (options if word == "${args}" else [word]))
    assert (program, command) == ("${program}", "fit")
    config = config_of(capsys, *words)
    for name, value in values.items():
        found = config
        for key in name.split("."):
            found = found[key]
        assert found == value
    assert config["trainer"]["logger"]["init_args"]["offline"] is False
    report = {"ships": "x", "rows": [{**Row("x", accuracy=0.5, p50_ms=1.0, file_bytes=1, speedup=1.0).to_dict()}]}
    assert sweep["metric"]["name"] in scalars(Report.from_dict(report))
    assert sweep["metric"]["goal"] == "maximize"


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("WeightPruning", {"sparsity": 0.5}),
        ("ChannelPruning", {"pruning_ratio": 0.5}),
        ("QuantizationAwareTraining", {}),
        ("ModelExport", {}),
        ("ExactResume", {}),
    ],
)
def test_defaults_are_plain_values_that_survive_being_printed_and_read(capsys, tmp_path, name, required):
    parameters = inspect.signature(getattr(la, name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert yaml.safe_load(yaml.safe_dump(defaults)) == defaults
    callback = {"class_path": f"lightning_accel.{name}", "init_args": required}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(tmp_path, callbacks=[callback])))
    first = printed(capsys, "-c", "run.yaml")
    assert yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"] == {**defaults, **required}
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(capsys, "-c", "printed.yaml") == first


# --- a real run


def run_config(folder, *, callbacks=None, student=None, data="tests.cli.test_lightning_cli.Data", teacher=None) -> dict:
    accel = "lightning_accel"
    return {
        "seed_everything": 1,
        "model": {
            "class_path": f"{accel}.DistillationModule",
            "init_args": {
                "student": student
                or {"class_path": "tests.support.models.Classifier", "init_args": {"width": 8, "lr": 0.1}},
                "alpha": 0.1,  # the teacher has learned nothing; the labels teach
                "teacher": teacher or {"class_path": "tests.support.models.Residual", "init_args": {"width": 12}},
            },
        },
        "data": {"class_path": data},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder),
            "callbacks": callbacks
            or [
                {"class_path": f"{accel}.WeightPruning", "init_args": {"sparsity": 0.5, "end": 1}},
                {
                    "class_path": f"{accel}.QuantizationAwareTraining",
                    "init_args": {"target": "portable", "start": 1, "calibration_batches": 2},
                },
                {
                    "class_path": f"{accel}.ModelExport",
                    "init_args": {"dirpath": str(Path(folder) / "bundle"), "engines": ["onnxruntime"]},
                },
            ],
        },
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which ``fit`` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(folder)
    config["data"]["init_args"] = {"train": 512}
    config["model"]["init_args"]["alpha"] = 0.1  # this teacher has learned nothing
    config["model"]["init_args"]["student"]["init_args"]["lr"] = 0.03  # at 0.1 this little net learns in some runs only
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.run(
        [sys.executable, "-m", "lightning_accel", "fit", "-c", str(folder / "run.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder, process


def test_fit_writes_a_bundle_and_ends_with_the_table(trained):
    folder, process = trained
    lines = process.stdout.strip().splitlines()
    assert lines[-2] == f"Report: {folder / 'bundle' / 'report.html'}"
    assert lines[-1].startswith("Ships student ")
    assert any(line.startswith("| student int8") for line in lines)
    assert "LeafSpec" not in process.stderr
    assert "Tip: " not in process.stderr
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    assert manifest["complete"]
    run = json.loads((folder / "bundle" / "report.json").read_text())["run"]
    assert run["command"] == f"__main__.py fit -c {folder / 'run.yaml'}"
    assert yaml.safe_load(run["config"])["trainer"]["max_epochs"] == run_config(folder)["trainer"]["max_epochs"]
    saved = yaml.safe_load(next(folder.rglob("config.yaml")).read_text())
    assert yaml.safe_load(run["config"]) == saved  # what SaveConfigCallback keeps
    assert la.load_runner(folder / "bundle")(images(4)[:][0].numpy()).shape == (4, 4)


def test_export_repeats_the_same_file(trained, capsys):
    folder, _ = trained
    before = (folder / "bundle" / "model.onnx").read_bytes()
    ckpt = ["--ckpt-path", str(folder / "bundle.ckpt")]
    saved = folder / "config.yaml"  # what Lightning wrote when the run began
    for args in ([folder / "run.yaml"], [saved, *ckpt]):  # without: the checkpoint beside the bundle
        (folder / "bundle" / "model.onnx").write_bytes(b"")
        assert main(["export", "-c", *map(str, args)]) == 0
        assert "| student int8" in capsys.readouterr().out
        assert (folder / "bundle" / "model.onnx").read_bytes() == before


def test_validate_test_and_predict_compute_what_was_trained(trained, capsys):
    folder, _ = trained
    arguments = ["-c", str(folder / "run.yaml"), "--ckpt-path", str(folder / "bundle.ckpt")]
    report = json.loads((folder / "bundle" / "report.json").read_text())
    trained_accuracy = next(c["metric"]["val_accuracy"][0] for c in report["verification"] if "metric" in c)
    for command in ("validate", "test", "predict"):
        assert main([command, *arguments]) == 0
        out = capsys.readouterr().out
        if command == "validate":
            assert float(out.split("val_accuracy")[1].split()[1]) == pytest.approx(trained_accuracy)
    assert trained_accuracy > 0.5  # 0.25 is chance
    assert main(["validate", *arguments[:2]]) == 0  # the untrained network
    assert float(capsys.readouterr().out.split("val_accuracy")[1].split()[1]) != pytest.approx(trained_accuracy)


def test_fit_resumes_from_the_overlay_s_checkpoint(tmp_path):
    """From ``configs/resume.yaml``, with its folder and interval replaced; the weights are those of one run."""
    overlay = yaml.safe_load((ROOT / "configs" / "resume.yaml").read_text())
    overlay["trainer"]["callbacks+"][1]["init_args"] |= {"dirpath": "kept", "every_n_train_steps": 6}
    (tmp_path / "resume.yaml").write_text(yaml.safe_dump(overlay))
    config = run_config(tmp_path)
    config["trainer"]["callbacks"].pop()
    config["trainer"]["enable_checkpointing"] = True
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    base = ["fit", "-c", "run.yaml", "-c", "resume.yaml"]
    assert main(base) == 0
    straight = torch.load("kept/last.ckpt", weights_only=True)
    assert straight["global_step"] == 12
    assert main([*base, "--trainer.callbacks+=tests.cli.test_lightning_cli.StopAfter"]) == 1  # unfinished
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 6
    assert main([*base, "--ckpt-path", "kept/last.ckpt"]) == 0
    resumed = torch.load("kept/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 12
    assert all(torch.equal(resumed["state_dict"][name], value) for name, value in straight["state_dict"].items())


@pytest.mark.parametrize("mark", [False, True])
def test_a_run_that_ends_unfinished_is_no_success(tmp_path, capfd, mark):
    """8 steps an epoch, and two of ten calibration batches are missing; a user who marks the bundle knows."""
    config = run_config(tmp_path)
    callbacks = config["trainer"]["callbacks"]
    callbacks[QAT]["init_args"]["calibration_batches"] = 10
    if not mark:
        del callbacks[EXPORT]
    else:
        callbacks[EXPORT]["init_args"] |= {"incomplete": "mark"}
        del callbacks[QAT]
        callbacks[PRUNING]["init_args"]["end"] = 2
        callbacks.append({"class_path": "tests.cli.test_lightning_cli.StopAfter"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "run.yaml"]) == (0 if mark else 1)
    err = capfd.readouterr().err.strip().splitlines()
    if not mark:
        assert err[-1].startswith("lightning-accel: error: The run ended before its targets were reached: Quantization")
        assert "has seen 8 of 10 calibration batches" in err[-1]


@pytest.mark.filterwarnings("ignore:ModelExport. ")
def test_a_run_without_one_of_its_engines_is_no_success(tmp_path, capsys):
    """The bundle is there, with the other engine; the exit code and the last line say that one is missing."""
    register_engine(UNLOADABLE)
    try:
        config = run_config(tmp_path)
        export = config["trainer"]["callbacks"][EXPORT]
        export["init_args"] |= {"engines": ["onnxruntime", "unloadable"]}
        config["trainer"]["callbacks"] = [export]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "-c", "run.yaml"]) == 1
        last = capsys.readouterr().out.strip().splitlines()[-2]
        assert last.startswith("FAILED, and not in the bundle: unloadable (load): it has no such operator.")
        la.load_runner(export["init_args"]["dirpath"]).close()
    finally:
        unregister_engine("unloadable")


class StopAfter(L.Callback):
    """An interruption: seven steps, and no more."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 7


# --- bad input


def changed(callback=None, **init_args):
    """Edit of a config: arguments of one of its callbacks, or of the run's parts."""

    def edit(config):
        if callback is not None:
            config["trainer"]["callbacks"][callback]["init_args"] |= init_args
        for part, value in {} if callback is not None else init_args.items():
            if part == "data":
                config["data"] = value
            else:
                config["model"]["init_args"][part] = value

    return edit


PRUNING, QAT, EXPORT = range(3)
EMPTY = {"class_path": "tests.cli.test_lightning_cli.Data", "init_args": {"held_out": 0}}
BAD = {
    "sparsity": (changed(PRUNING, sparsity=1.5), "`sparsity` must be a share of zeros in [0, 1), but got 1.5"),
    "target": (changed(QAT, target="tpu"), "`target` must be one of ['onnxruntime', 'openvino', 'portable', 'tensorrt'], but got 'tpu'"),
    "glob, pruning": (changed(PRUNING, include=["encoder.*"]), "`include` must"),
    "glob, quantization": (changed(QAT, exclude=["encoder.*"]), "`exclude` must"),
    "dirpath": (changed(EXPORT, dirpath="/proc/bundle"), "`dirpath` must lie in a folder that can be written to, but got '/proc/bundle'"),
    "no held-out data": (
        changed(data={"class_path": "tests.cli.test_lightning_cli.TrainingData"}),
        "`data` must be held-out data, but got None",
    ),
    "empty held-out data": (changed(data=EMPTY), "empty"),
    "end before start": (changed(PRUNING, start=2, end=1), "`end` must be at or after `start` (2), but got 1"),
    "end before start, in steps": (changed(PRUNING, start=0.9, end=1), "`end` must be at or after `start` (0.9"),
    "start beyond the run": (changed(QAT, start=7), "`start` must lie within the run's 2 epochs, but got 7"),
    "not capturable": (changed(student={"class_path": "tests.cli.test_lightning_cli.Branching"}), "test_lightning_cli.py"),
    "unlike teacher": (changed(teacher={"class_path": "tests.cli.test_lightning_cli.FiveClasses"}), "(3, 4) and (3, 5)"),
    "unknown argument": (changed(PRUNING, sparsitty=0.5), "'sparsitty' is not accepted"),
}  # fmt: skip


def told(capfd) -> str:
    """The error's one line; what Lightning says before it is its own."""
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("lightning-accel: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert err.rstrip().endswith(lines[0])
    return lines[0]


def test_the_config_of_a_run_is_not_written_over(tmp_path):
    """Without a logger Lightning keeps its record in the present folder, under the name that tutorials give the user's own file."""
    config = run_config(tmp_path)
    config["trainer"] |= {"max_epochs": 1, "callbacks": [], "logger": False}
    text = "# mine\n" + yaml.safe_dump(config)
    for name in ("config.yaml", "run.yaml"):
        (tmp_path / name).write_text(text)
        assert main(["fit", "-c", name]) == 0
        assert (tmp_path / name).read_text() == text
    assert "# mine" not in (tmp_path / "config.yaml").read_text()  # the record of the second run


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line_and_leaves_nothing_behind(tmp_path, capfd, case):
    edit, expected = BAD[case]
    config = run_config(tmp_path)
    edit(config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "run.yaml"]) != 0
    assert expected in told(capfd)
    left = {path.name for path in tmp_path.iterdir()} - {"config.yaml"}  # Lightning's own record, once a run has begun
    assert left == {"run.yaml"}


@pytest.mark.parametrize(
    ("command", "option"), [("fit", "--ckpt-path"), ("test", "--ckpt-path"), ("export", "--ckpt-path")]
)
@pytest.mark.parametrize("content", [b"", b"half a chec", None], ids=["empty", "damaged", "missing"])
def test_a_damaged_checkpoint_is_told_in_one_line(trained, tmp_path, capfd, command, option, content):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(tmp_path)))
    files = ["run.yaml"]
    if content is not None:
        (tmp_path / "damaged.ckpt").write_bytes(content)
        files.append("damaged.ckpt")
    assert main([command, "-c", "run.yaml", option, "damaged.ckpt"]) != 0
    assert "damaged.ckpt" in told(capfd)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_a_checkpoint_cut_short(trained, tmp_path, capfd):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(tmp_path)))
    whole = (trained[0] / "bundle.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert main(["export", "-c", "run.yaml", "--ckpt-path", "cut.ckpt"]) == 1
    assert "`ckpt_path` must be a readable checkpoint, but got 'cut.ckpt'" in told(capfd)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fot"], "unknown command `fot`. Did you mean `fit`?"),
        (["fit", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--trainer.max_epochs", "many"], "`trainer.max_epochs` is not valid: Expected a <class 'int'>. Got value: many."),
        (["fit", "--trainer.nonsense", "1"], "unknown option `--trainer.nonsense`"),
        (["fit", "--trainer.max-epoch", "1"], "unknown option `--trainer.max-epoch`. Did you mean `--trainer.max-epochs`?"),
        (["quantize", "--ckpt", "x.ckpt"], "unknown option `--ckpt`. Did you mean `--ckpt-path`?"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read(capfd, args, expected):
    assert main(args) == 2
    assert expected in told(capfd)


def test_the_process_itself_exits_with_the_code(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "lightning_accel", "fit", "--trainer.max_epochs", "many"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1


class Buggy(Classifier):
    def configure_optimizers(self):
        return {}["no such key"]


def test_a_bug_in_the_user_s_code_keeps_its_traceback(tmp_path):
    config = run_config(tmp_path, student={"class_path": "tests.cli.test_lightning_cli.Buggy"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(KeyError, match="no such key"):
        main(["fit", "-c", "run.yaml"])


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ACCEL_DEBUG", "1")
    config = run_config(tmp_path)
    config["trainer"]["callbacks"][0]["init_args"]["sparsity"] = 1.5
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="sparsity"):
        main(["fit", "-c", "run.yaml"])


# --- help


def test_help_version_and_nothing(capsys):
    for option in ("--version", "-V"):
        assert main([option]) == 0
        assert capsys.readouterr().out == f"lightning-accel {la.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 2  # a script that forgot the command must notice
    assert capsys.readouterr().out == text
    assert set(TRAINER_COMMANDS) == set(AccelCLI.subcommands())
    assert all(f"\n  {command} " in text for command in (*TRAINER_COMMANDS, *COMMANDS))


def test_the_help_of_a_command_writes_options_with_dashes(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    assert "--calibration-batches CALIBRATION_BATCHES" in text
    assert "--trainer.max-epochs" in text
    assert "--calibration_batches" not in text


def test_only_the_one_foreign_warning_is_silenced(capsys):
    before = len(warnings.filters)
    main(["fit", "--nothing-of-the-kind"])
    new = warnings.filters[: len(warnings.filters) - before]
    assert len(new) == 1
    assert new[0][0] == "ignore"
    assert "LeafSpec" in new[0][1].pattern
