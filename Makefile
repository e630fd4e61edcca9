# One command set for people and CI. Every target does the set-up that it needs, in .venv; a second time is a no-op.
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.tailrace-ready
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup check test bench bench-peers proto docs demo up chaos kernels-full clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(READY) ## .venv with everything; TORCH=cpu or TORCH=cuda decides which PyTorch

$(READY): pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

demo: $(READY) ## one gateway, one prefill, one decode: ask, stream the answer, show where the time went
	@$(BIN)/tailrace demo

up: $(READY) ## the same, staying up: an OpenAI API at 127.0.0.1:8000/v1 (options: ARGS="--decode 2")
	@$(BIN)/tailrace up $(ARGS)

test: $(READY) ## all tests but chaos (options: ARGS="-k hashing")
	@$(BIN)/pytest -q $(ARGS)

check: $(READY) ## lint, format, types, architecture, generated code
	@scripts/check.sh

bench: $(READY) ## Tailrace and its peers in turn, then its own benchmarks; writes docs/benchmarks/<date>.md
	@$(BIN)/python -m benchmarks.compare $(ARGS)

bench-peers: $(READY) ## the peers, each in its own environment (minutes, gigabytes)
	@benchmarks/setup_peers.sh

proto: $(READY) ## generate the gRPC stubs after a change in proto/
	@scripts/buf.sh lint
	@scripts/proto.sh

docs: $(READY) ## bring the module list of docs/structure.md up to date
	@$(BIN)/python scripts/structure.py

chaos: $(READY) ## the tests that kill and stop processes
	@$(BIN)/pytest -q -m chaos $(ARGS)

kernels-full: $(READY) ## every kernel case (minutes)
	@$(BIN)/pytest -q tests/kernels -m "" $(ARGS)

clean: ## forget .venv and caches
	rm -rf .venv build dist node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info
