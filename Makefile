# make demo | make test | make lint | make install
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint wheel clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Built from this tree, and imported from the wheel alone.
wheel: $(INSTALLED)
	rm -rf build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -c 'import lightning_accel as la; assert "site" in la.__file__, la.__file__; print(la.__version__, [getattr(la, n).__name__ for n in la.__all__ if n[0] != "_"])'

clean:
	rm -rf .venv build artifacts .mypy_cache .ruff_cache .pytest_cache
