# Needs Python 3.11 or newer with venv, and nothing else. Every target is safe to repeat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart launch-data test slow lint clean

setup: $(VENV)/.complete

# Made again when the dependencies change; the marker is written last, so that an interrupted install is taken up again.
$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "distft needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The main job: fine-tune SmolLM2-135M on State of the Union addresses, and show that it got better.
# A run that is there already is kept, and this one gets a name of its own.
quickstart: setup
	$(BIN)/distft run launch/quickstart.yaml $$(test -e runs/quickstart && echo --name quickstart-$$(date +%Y%m%d-%H%M%S))

# Rows for the other jobs in launch/, from packages of the index and Python's own library.
launch-data: $(patsubst launch/data/make_%.py,launch/data/%.jsonl,$(wildcard launch/data/make_*.py))

launch/data/%.jsonl: launch/data/make_%.py $(VENV)/.complete
	$(BIN)/python $< > $@.part && mv $@.part $@

lint: setup
	$(BIN)/ruff format --check distft tests benchmarks launch
	$(BIN)/ruff check distft tests benchmarks launch
	$(BIN)/mypy
	$(BIN)/lint-imports

# Unit tests run two at a time; the others start many processes themselves. Both are run, even
# where the first fail.
test: lint
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --durations 5 -n 2 tests/unit || status=1; \
	$(BIN)/pytest -m "not slow" --durations 25 --ignore tests/unit || status=1; \
	exit $$status

# The long proofs, hours of them, or some: `make slow TESTS=tests/integration/test_hosts.py`. What they said is kept in
# benchmarks/baselines/slow-tests.json. Hosts of their own want root, and Debian's packages.
TESTS ?= tests
slow: setup
	sh tests/packages.sh slow
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'moto[cloudformation]'  # AWS, with cfn-lint
	$(BIN)/pytest -m slow --record $(TESTS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
