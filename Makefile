# `make demo` and `make test` do all the set-up: they create .venv and install what they need into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean FORCE

demo: .venv/demo.installed
	$(BIN)/zerofl run demo --resume

test: .venv/test.installed
	$(BIN)/python -m pytest

lint: .venv/dev.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# An editable install keeps a list of the modules, so a new one has to be installed too.
MODULES := $(sort $(shell find src -name '*.py'))
.venv/modules: FORCE
	@mkdir -p .venv && echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' > $@

.venv/%.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cpp/*) .venv/modules
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
