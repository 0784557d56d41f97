# `make demo` and `make test` do all the set-up: they create .venv and install what they need into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs sanitize test-aarch64 wheel matrix clean FORCE

demo: .venv/demo.installed
	$(BIN)/zerofl run demo --resume

# Files of tests at once: as many as the smallest machine has cores. `make test JOBS=8` takes 2 GB of memory for each.
JOBS ?= 2
test: .venv/test.installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: .venv/dev.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files -z -- ':!results' ':!benchmarks/results' | xargs -0 $(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror cpp/*/*

# The documents as a site: build/site/index.html. Its warnings are errors, and neither making nor reading it needs the
# network.
docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "build/site/index.html is made; for its search: $(BIN)/python -m http.server --directory build/site"

# The kernels' tests under the address and undefined-behaviour sanitizers, on a build of its own. -S leaves out the
# editable install.
sanitize: .venv/test.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/sanitize \
	  -C cmake.define.ZEROFL_SANITIZE=ON -C build-dir=build/sanitize-objects .
	PYTHONPATH=build/sanitize:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(BIN)/python -S -m pytest -s -p no:cacheprovider \
	  tests/sparse/test_kernels.py tests/sparse/test_bindings.py tests/sparse/test_selection.py tests/sparse/test_layout.py \
	  tests/sparse/test_conv_norm.py tests/sparse/test_sgd_kernel.py tests/sparse/test_scan_ahead.py \
	  tests/sparse/test_powerpropagation.py \
	  tests/exchange/wire/test_native.py tests/exchange/wire/test_received.py

# The kernels' tests for ARM under emulation; needs g++-aarch64-linux-gnu and qemu-user.
test-aarch64:
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || \
	  { echo "first: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	@mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=fast -mtune=cortex-a76 -DISA=baseline -Icpp -static \
	  -o build/check_kernels-aarch64 tests/sparse/check_kernels.cpp cpp/kernels/*.cpp cpp/ops/*.cpp cpp/codec/*.cpp \
	  cpp/runtime/*.cpp -lpthread
	qemu-aarch64 build/check_kernels-aarch64 200

# The sdist and the wheel in dist/, and the tests against the wheel, installed outside this folder:
# make wheel TESTS="tests/sparse tests/exchange" runs a part of them.
TESTS ?=
wheel: .venv/dev.installed
	$(BIN)/python benchmarks/wheels.py $(TESTS)

# The same on each Python, torch and numpy that is here, with kernels and without a compiler; the others are named. The
# record that is committed is only written where RECORD says so.
PYTHONS ?= 3.11 3.12 3.13
RECORD ?= build/matrix.json
matrix: .venv/dev.installed
	$(BIN)/python benchmarks/matrix.py --record $(RECORD) --python $(PYTHONS) -- $(TESTS)
	$(BIN)/python benchmarks/check.py

# An editable install keeps a list of the modules, so a new one has to be installed too.
MODULES := $(sort $(shell find src -name '*.py'))
.venv/modules: FORCE
	@mkdir -p .venv && echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' > $@

.venv/%.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cpp/*/*) .venv/modules
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
