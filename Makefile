# make demo   the whole way on this machine, with real parts, in under two minutes
# make test   checks and every test, real containers included
# Both install what is missing: Debian packages by apt, Python packages into .venv from the lock.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := python3-venv git containerd runc nftables iproute2 dnsutils curl docker-registry tcc busybox-static procps ca-certificates
BENCH_PACKAGES := etcd-server

.DEFAULT_GOAL := help
.PHONY: help demo test check unit bench soak soak-mutants install clean

help:
	@sed -n 's/^# //p' Makefile; echo 'make bench  ratios against peers; make soak  longer proofs; make check  style and types'

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml Makefile
	@PACKAGES="$(PACKAGES)" PYTHON="$(PYTHON)" bash examples/demo/install.sh
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m examples.demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest -q -m "not containers"

test: check
	@$(BIN)/python -m tests.together

bench: $(STAMP)
	@BENCH_PACKAGES="$(BENCH_PACKAGES)" bash examples/demo/install.sh
	$(BIN)/python -m bench

soak: $(STAMP)
	$(BIN)/python -m tests.sim.soak --goal 10000
	$(BIN)/python -m tests.proof.rounds --rounds 50

soak-mutants: $(STAMP)
	$(BIN)/python -m tests.sim.mutants
	$(BIN)/python -m tests.sim.whole.mutants

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
