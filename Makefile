# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-run
SSLBENCH := $(CURDIR)/$(BIN)/sslbench

.PHONY: equality demo test slow cluster chaos lint docs surface bench bench-quick clean install test-install

install: $(VENV)/.installed
test-install: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("sslbench needs Python >= 3.11, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.installed

# Real runs on the digits that come with the installation; every number is computed here and now.
demo: $(VENV)/.installed
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && $(SSLBENCH) pretrain --recipe demo/random
	cd $(DEMO) && $(SSLBENCH) pretrain --recipe demo/scrl run.name=scrl
	cd $(DEMO) && $(SSLBENCH) eval transfer scrl datasets=[digits]
	cd $(DEMO) && $(SSLBENCH) pretrain --recipe demo/byol
	cd $(DEMO) && $(SSLBENCH) pretrain --recipe demo/supervised
	cd $(DEMO) && $(SSLBENCH) compare
	@echo
	@echo "Look at the runs:  cd $(DEMO) && ../$(BIN)/mlflow ui    then open http://127.0.0.1:5000"
	@echo "Go on:             cd $(DEMO) && ../$(BIN)/sslbench pretrain --recipe demo/simclr --seeds 1,2,3"

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q -m 'not slow and not gpu' -n 2

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m 'slow and not cluster' -n 2

# Launches, jobs and worlds of several processes: a quarter of an hour on two cores that do nothing else.
cluster: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m cluster -n 2

# Inflicts every fault as often as the report says, for the better part of an hour; ONLY=killing for a part of them.
ONLY ?= *
chaos: $(VENV)/.installed-dev
	cd tests && $(CURDIR)/$(BIN)/python -m chaos --only '$(ONLY)' --out $(CURDIR)/benchmarks/results

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check sslbench plugins tests benchmarks
	$(BIN)/ruff format --check sslbench plugins tests benchmarks
	$(BIN)/mypy

# The generated pages, and the site in site/; a warning is an error. Read it: python -m http.server -d site
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sslbench.report.reference docs/reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What users and plugins may rely on, as it is now; see docs/compatibility.md before you keep it.
surface: $(VENV)/.installed-dev
	$(BIN)/python tests/public_surface.py

# Measures for about an hour; wants a machine that nothing else uses. PEER: a Python that can import lightly.
PEER ?= $(BIN)/python
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/peers.py --peer-python $(PEER)
	$(BIN)/python benchmarks/peers.py --peer-python $(PEER) --backbone resnet18
	$(BIN)/python benchmarks/phases.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/decoded.py --out benchmarks/results/decoded-jpeg.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation.py --threads 1

# Every method on 2 and on 4 processes against one.
equality: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/equality.py

bench-quick: $(VENV)/.installed
	for name in peers phases scaling start; do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

clean:
	rm -rf $(DEMO) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
