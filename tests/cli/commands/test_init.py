"""``lightning-accel init`` writes a project that trains and exports without anything from the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_accel as la
from lightning_accel.cli.main import main

FILES = {"config.yaml", "data.py", "model.py", "resume.yaml", "wandb.yaml"}
PACKAGE = Path(la.__file__).parent
ALONE = """
import sys
class Block:  # the repository's own packages
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("examples", "experiments", "tests"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
from lightning_accel.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def alone(folder, *words):
    """Run a command in ``folder`` where only the package can be imported."""
    (folder.parent / "site").mkdir(exist_ok=True)
    link = folder.parent / "site" / "lightning_accel"
    if not link.exists():
        link.symlink_to(PACKAGE)
    environment = {**os.environ, "PYTHONPATH": str(link.parent)}
    command = [sys.executable, "-c", ALONE, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "project"]) == 0
    return tmp_path / "project"


def test_the_project_trains_and_exports_a_verified_bundle(project):
    assert {path.name for path in project.iterdir()} == FILES
    quick = [
        "--data.train=512",
        "--data.held-out=64",
        "--trainer.accelerator=cpu",
        "--trainer.enable-progress-bar=false",
    ]
    done = alone(project, "fit", "-c", "config.yaml", "-c", "resume.yaml", *quick)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((project / "bundle" / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["precision"], manifest["default"]["engine"]) == ("int8", "onnxruntime")
    assert all(not line.get("failures") for line in manifest["verification"])
    assert (project / "checkpoints" / "last.ckpt").is_file()
    assert alone(project, "verify", "bundle", "--data", _samples(project)).returncode == 0


def _samples(project):
    code = "import numpy as np; from data import Images; np.save('x.npy', Images(held_out=40).parts[1][:][0].numpy())"
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True)
    return "x.npy"


def test_every_config_parses(project):
    for overlay in ("resume.yaml", "wandb.yaml"):
        done = alone(project, "fit", "-c", "config.yaml", "-c", overlay, "--print-config")
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load(done.stdout)
        assert len(config["trainer"]["callbacks"]) >= 4
        assert (project / overlay).read_text().startswith(f"# lightning-accel fit -c config.yaml -c {overlay}\n")


def test_the_files_need_no_torch_to_be_written(tmp_path):
    code = "import sys; from lightning_accel.cli.main import main; code = main(['init', 'p']); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_nothing_is_overwritten(project, capsys):
    (project / "model.py").write_text("mine")
    for name in FILES - {"model.py"}:
        (project / name).unlink()
    assert main(["init", "project"]) == 1
    assert "but got project with model.py. Choose another folder." in capsys.readouterr().err
    assert [path.name for path in project.iterdir()] == ["model.py"]
    assert (project / "model.py").read_text() == "mine"
    assert main(["init", "project/model.py"]) == 1
    assert "Argument `folder` must be a folder, but got the file project/model.py." in capsys.readouterr().err


def test_without_a_folder_it_writes_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "Train and export with: lightning-accel fit -c config.yaml" in capsys.readouterr().out
