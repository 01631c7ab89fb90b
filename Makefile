# make demo, make test, make test-fast, make lab: each prepares what it needs first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-fast lab clean

demo: $(READY)
	$(BIN)/safelab demo

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest tests/unit

lab: $(READY)
	$(BIN)/safelab lab

# On Linux, constraints.txt pins the CPU build of torch. For a GPU install torch into .venv first, as pytorch.org says.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
