# make demo | make test | make lint | make docs | make empty-environments | make experiments-compare | make install | make zoo | make gpu-check | make test-versions
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ZOO := .venv-zoo/.installed

.PHONY: install demo test coverage lint docs wheel empty-environments experiments-compare gpu-check test-versions zoo clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Teacher once, then the student: distilled, pruned, quantization-aware trained, exported, verified, built, measured.
demo: $(INSTALLED) artifacts/teacher.ckpt
	$(BIN)/lightning-accel fit --config configs/quickstart.yaml

artifacts/teacher.ckpt: $(INSTALLED)
	$(BIN)/lightning-accel fit --config configs/teacher.yaml

# Two processes with a thread each: tiny networks gain nothing from more, and wait for each other with it.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

# The same with the share of lines that the tests run. It takes 1.7 times as long, too long for CI; it has no threshold.
coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov=lightning_accel --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site, in build/site; a broken link or an unknown name is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The tutorial of the first ten minutes, and the oldest and newest versions of the extra `runtime`, in empty environments: about ten minutes.
empty-environments: wheel
	CONSTRAINTS=$(CURDIR)/constraints.txt .ci/first-minutes $(BIN)/python
	.ci/runtime-versions $(BIN)/python

# The suite with the oldest and the newest versions: make test-versions ARGS="oldest tests/onnx"
test-versions:
	.ci/test-versions $(PYTHON) $(ARGS)

# New results of the experiments beside the recorded ones: make experiments-compare ARGS="--against HEAD~5"
experiments-compare: $(INSTALLED)
	$(BIN)/python -m experiments.compare $(ARGS)

# One page about a machine with an NVIDIA GPU, offline, under ten minutes; it needs an environment with this package's dependencies.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m experiments.gpu_check $(ARGS)

# Built from this tree, and imported from the wheel alone.
wheel: $(INSTALLED)
	rm -rf build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -c 'import lightning_accel as la; assert "site" in la.__file__, la.__file__; print(la.__version__, [getattr(la, n).__name__ for n in la.__all__ if n[0] != "_"])'
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -m lightning_accel init project

# Ordinary networks of torchvision, timm and transformers, each shipped from `fit`: hours, and not part of `test`. It goes on where it
# stopped; `make zoo ARGS="--minutes 30 --networks ResNet-50"` runs a part, `make zoo ARGS=--table` prints what is known.
zoo: $(ZOO)
	.venv-zoo/bin/python -m experiments.real_zoo $(ARGS)

$(ZOO): pyproject.toml constraints-zoo.txt
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-zoo.txt \
		'torch==2.14.1' 'torchvision==0.29.1' timm 'transformers>=5,<6' --editable '.[cpu,openvino,tensorrt-rtx]'
	@touch $@

clean:
	rm -rf .venv .venv-zoo build artifacts .mypy_cache .ruff_cache .pytest_cache
