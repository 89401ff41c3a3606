# make demo    find planted sentences in 131,072 tokens of text, on the GPU if there is one; writes demo-output/
# make test    the whole test suite
# make check   lint, types, import graph, documentation
# make docs    the documentation as a site, docs-output/index.html; no network is needed
# make bench   time score_topk on this machine; writes bench-output/
# make check-kernels   compile every kernel of score_topk, of which `make test` compiles a sample; no GPU is needed
#
# Each makes .venv on first use, with the torch that constraints.txt pins (a CPU build will do), unless PYTHON names an
# interpreter that already has torch: then that one is used, `make demo PYTHON=/path/to/python`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test check check-kernels docs bench clean

demo: $(VENV)/.run
	$(BIN)/lightning-indexer demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/links.py
	$(BIN)/python -m pytest tests/test_imports.py tests/test_docs.py
	$(MAKE) docs

check-kernels: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_cuda_compile.py -m slow

docs: $(VENV)/.dev
	$(BIN)/python docs/crossover.py
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs-output

bench: $(VENV)/.dev
	$(BIN)/lightning-indexer bench --peer transformers

clean:
	rm -rf $(VENV) demo-output bench-output docs-output

$(VENV)/bin/python:
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && touch $(VENV)/.torch-given; \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi

# The extra with the kernel compiler that fits torch's CUDA, where there is a GPU.
GPU_EXTRA = $$($(BIN)/python -c "import torch; \
	print('cuda' + torch.version.cuda.split('.')[0] if torch.version.cuda and torch.cuda.is_available() else '')")

# A given torch is kept as it is: the pins apply only where torch comes from here.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$$(test -e $(VENV)/.torch-given || echo "-c constraints.txt")

$(VENV)/.run: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) -e ".[plots]"
	-extra=$(GPU_EXTRA); test -z "$$extra" || $(INSTALL) -e ".[plots,$$extra]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) -e ".[plots,test,dev,docs,cuda13]"
	touch $@
