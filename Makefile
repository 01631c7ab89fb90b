# make demo, make test, make test-fast, make lab: each prepares what it needs first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Unit tests use one thread, so two processes share two cores; notebooks and the demo use both by themselves.
SHARED := --numprocesses 2 --dist loadfile --no-loadscope-reorder
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)

.PHONY: demo test test-fast lab chromium clean

demo: $(READY)
	$(BIN)/safelab demo

test: $(READY) chromium
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest $(SHARED) tests/unit

lab: $(READY)
	$(BIN)/safelab lab

# On Linux, constraints.txt pins the CPU build of torch. For a GPU install torch into .venv first, as pytorch.org says.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# The notebooks are tested in a real browser, Debian's. Where it cannot be installed those tests are skipped, and say so.
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { $(AS_ROOT) apt-get update && $(AS_ROOT) env DEBIAN_FRONTEND=noninteractive \
		apt-get install --yes --no-install-recommends chromium; } || echo "no chromium: the tests in a browser will be skipped"

clean:
	rm -rf .venv
