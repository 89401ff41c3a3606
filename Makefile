# make demo    find planted sentences in 131,072 tokens of text; writes demo-output/
# make test    the whole test suite
# make check   lint, types, import graph
# make bench   time score_topk on this machine; writes bench-output/
#
# Each makes .venv on first use, with the torch that constraints.txt pins (a CPU build will do), unless PYTHON names an
# interpreter that already has torch: then that one is used, `make demo PYTHON=/path/to/python`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test check bench clean

demo: $(VENV)/.run
	$(BIN)/lightning-indexer demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: $(VENV)/.dev
	$(BIN)/lightning-indexer bench --peer transformers

clean:
	rm -rf $(VENV) demo-output bench-output

$(VENV)/bin/python:
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && touch $(VENV)/.torch-given; \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi

# A given torch is kept as it is: the pins apply only where torch comes from here.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$$(test -e $(VENV)/.torch-given || echo "-c constraints.txt")

$(VENV)/.run: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) -e ".[plots]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) -e ".[plots,test,dev,cuda13]"
	touch $@
