# `make demo` and `make test` each work alone on a fresh machine with Python >= 3.11.

.PHONY: setup demo test check proto fresh bench clean
.DELETE_ON_ERROR:

# Another interpreter: make PYTHON=python3.12 setup
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$python; break; }; done)

BIN := .venv/bin
PLAIT := $(BIN)/plait
STAMP := .venv/.setup
# libp2p pins fastecdsa, which has no Linux wheel: it is compiled, against GMP and Python.
SYSTEM_PACKAGES := gcc libc6-dev libgmp-dev python3-dev python3-venv
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/plait/v1/*.proto
DEMO_PROMPT := Why is the sky blue? Answer in one sentence.

# Everything the other targets need, in .venv.
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: Plait needs Python 3.11 or later" >&2; \
		echo "try: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),setup)" >&2; exit 1; fi
	@probe=$$(mktemp); trap 'rm -f "$$probe"' EXIT; ready() { \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null && \
		include=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
		printf '#include <gmp.h>\n#include <Python.h>\nint main(void) { return 0; }\n' \
		| cc -I"$$include" -x c -o "$$probe" - -lgmp 2>/dev/null; }; \
	install="apt-get install -y --no-install-recommends $(SYSTEM_PACKAGES)"; \
	if ! ready && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$install; fi; \
	if ! ready; then \
		echo "error: a C compiler, the GMP and Python headers or python3-venv are missing" >&2; \
		echo "try: sudo $$install" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all,dev]'
	@touch $@

# A network of four nodes on this machine, one paid and verified answer, and its end.
demo: setup
	@$(PLAIT) testnet down --dir .demo 2>/dev/null || true
	@set -e; trap '$(PLAIT) testnet down --dir .demo >/dev/null 2>&1 || true' EXIT; \
	trap 'exit 130' INT TERM HUP; \
	$(PLAIT) models pull smollm2-135m; \
	$(PLAIT) testnet up -n 4 --model smollm2-135m --detach --dir .demo; \
	$(PLAIT) run smollm2-135m "$(DEMO_PROMPT)" --max-tokens 64 \
		--network .demo/network.toml --bundle .demo/bundle.json; \
	$(PLAIT) verify .demo/bundle.json --network .demo/network.toml

test: setup
	@$(BIN)/pytest

# Everything but the tests.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	@$(MAKE) --no-print-directory fresh

# The committed generated code is what the protocol files say.
fresh: setup
	@set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(call PROTOC,"$$out"); \
	diff -r -x __init__.py -x __pycache__ "$$out/plait/v1" src/plait/v1 || { \
		echo "error: src/plait/v1 is not what proto/ says" >&2; \
		echo "try: make proto" >&2; exit 1; }

proto: setup
	$(call PROTOC,src)

bench: setup
	@set -e; for script in benchmarks/*.py; do \
		[ -e "$$script" ] || continue; echo "$$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf .venv .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
