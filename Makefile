# The commands of this project. `make demo` and `make test` work on a fresh machine with Python 3.11+ and nothing else.
#   PYTHON=python3.12 make demo      choose the interpreter
#   PIP_ARGS="..." make demo         arguments for pip, for example a mirror or an index with CPU wheels of torch
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CLAIMS := demo ingest_report ingest_real ingest_speed hostile_files big_jsonl dedup_recall teacher_faults pretrain_reference sft_vs_trl qlora_vs_bnb train_memory adapter_quality gsm8k_nano resume_kill serve_throughput serve_http serve_overload serve_prefix serve_speculation serve_cold_start serve_adapters serve_quality train_cost
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: demo test check web bench docs nano clean

demo: $(VENV)/.ready
	$(BIN)/garage demo $(ARGS)

test: $(VENV)/.ready-test check
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready-test
	failed=; for claim in $(CLAIMS); do echo "== $$claim"; $(BIN)/python bench/$$claim.py || failed="$$failed $$claim"; done; \
	test -z "$$failed" || { echo "not held:$$failed"; exit 1; }

web:
	@test -d web || { echo "There is no web app yet: it joins in a later release. The demo writes a page: make demo"; exit 2; }
	npm --prefix web ci && npm --prefix web run build

docs: $(VENV)/.ready
	$(BIN)/python docs/reference.py

nano: $(VENV)/.ready
	$(BIN)/python bench/nano/make_corpus.py --tokens 21_000_000 --out runs/nano-corpus
	$(BIN)/garage pretrain bench/nano/nano.toml
	$(BIN)/python bench/nano/publish.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Garage needs Python 3.11 or newer; choose one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch
	$(INSTALL) -e '.[server,docs,teacher]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(INSTALL) -e '.[all,test,samples]'
	touch $@

clean:
	rm -rf $(VENV) garage-demo
