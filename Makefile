# Each target sets up what it needs: a fresh clone, Python 3.10 or newer and make are enough.
#
#   make demo      capture a small model and show what was captured
#   make test      all tests but those on XLA
#   make test-xla  the tests on torch_xla, in an environment of its own: 7 GB, some minutes
#   make lint      ruff and mypy
#   make bench     what capturing costs, next to others: see benchmarks/README.md
#   make clean     remove the environments and everything the targets wrote
#
# Options: PYTHON=python3.12 (the interpreter), TORCH=torch==2.13.0+cu130 (another build of torch),
# TESTS=tests/core (some of the tests), BENCH="--quick" (options of the benchmark).
# pip's own configuration applies: an index, wheels on disk.

PYTHON ?= python3
TESTS ?= tests
BENCH ?=

VENV := .venv
PEER := .bench-venv
XLA := .xla-venv
PIP := -m pip --disable-pip-version-check --quiet
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# The newest torch_xla there is; the other versions it runs with are those of constraints.txt.
XLA_TORCH := torch==2.9.0 torch-xla==2.9.0

BUILD_TOOLS := hatchling editables
DEV_TOOLS := pytest pytest-xdist hypothesis mypy ruff tensorboard
# What the number formats are compared with. en-dtypes has wheels for these machines only.
ORACLES := gfloat ml_dtypes torchao "en-dtypes; python_version < '3.13' and \
    sys_platform == 'linux' and platform_machine == 'x86_64'"

# A change in one of these installs again; the packages' own sources are used where they lie.
INPUTS := constraints.txt $(wildcard packages/*/pyproject.toml) \
    packages/core/hatch_build.py packages/core/src/tensortap/native/build.py \
    $(wildcard packages/core/src/tensortap/native/*.[ch])

.DEFAULT_GOAL := help
.PHONY: help demo test test-xla lint bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/demo.stamp
	@rm -rf build/demo
	TENSORTAP_DIR=build/demo $(VENV)/bin/python examples/quickstart_hf.py
	$(VENV)/bin/tensortap show build/demo/* --step 0 --select "layers.0.*/forward/*"
	$(VENV)/bin/tensortap coverage build/demo/*

test: $(VENV)/dev.stamp
	$(VENV)/bin/python -m pytest -n auto --dist loadgroup -m "not xla" $(TESTS)

test-xla: $(XLA)/xla.stamp
	PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -n auto --dist loadgroup -m xla tests/neuron

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/dev.stamp $(PEER)/peer.stamp
	$(VENV)/bin/python benchmarks/capture.py $(BENCH)

clean:
	rm -rf $(VENV) $(PEER) $(XLA) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The build for the CPU is asked for first: on Linux the plain one brings gigabytes of CUDA.
define install_torch
	@echo "installing $(or $(TORCH),$(PINNED_TORCH)) into $(1)"
	@$(if $(TORCH),,$(1)/bin/python $(PIP) install $(PINNED_TORCH)+cpu 2>/dev/null \
	    || $(1)/bin/python $(PIP) install --retries 0 --timeout 10 \
	        --extra-index-url $(CPU_INDEX) $(PINNED_TORCH)+cpu 2>/dev/null \
	    ||) $(1)/bin/python $(PIP) install $(or $(TORCH),$(PINNED_TORCH))
endef

# $(1): an environment. Its stamp carries the Python version, so that another PYTHON makes another.
define new_environment
	@test -n "$(VERSION)" || { echo "PYTHON=$(PYTHON) does not run; name a Python 3.10 or" \
	    "newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "tensortap needs" \
	    "Python 3.10 or newer and $(PYTHON) is $(VERSION); name another:" \
	    "make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(1) with Python $(VERSION)"
	@$(PYTHON) -m venv --clear $(1)
endef

$(VENV)/python$(VERSION).stamp:
	$(call new_environment,$(VENV))
	@touch $@

$(PEER)/python$(VERSION).stamp:
	$(call new_environment,$(PEER))
	@touch $@

$(XLA)/python$(VERSION).stamp:
	$(call new_environment,$(XLA))
	@touch $@

$(VENV)/demo.stamp: $(VENV)/python$(VERSION).stamp $(INPUTS)
	$(call install_torch,$(VENV))
	@echo "installing tensortap and tensortap-hf into $(VENV)"
	@$(VENV)/bin/python $(PIP) install -c constraints.txt $(BUILD_TOOLS)
	@$(VENV)/bin/python $(PIP) install -c constraints.txt --no-build-isolation \
	    -e packages/core -e "packages/hf[framework]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "installing the other packages and the tools for tests into $(VENV)"
	@$(VENV)/bin/python $(PIP) install -c constraints.txt --no-build-isolation $(DEV_TOOLS) \
	    $(ORACLES) -e "packages/megatron[framework]" -e packages/neuron -e packages/analysis
	@touch $@

$(PEER)/peer.stamp: $(PEER)/python$(VERSION).stamp constraints.txt
	$(call install_torch,$(PEER))
	@echo "installing mindstudio-probe and weightwatcher into $(PEER)"
	@$(PEER)/bin/python $(PIP) install -c constraints.txt transformers mindstudio-probe \
	    weightwatcher
	@touch $@

$(XLA)/xla.stamp: $(XLA)/python$(VERSION).stamp $(INPUTS)
	@echo "installing $(XLA_TORCH) into $(XLA)"
	@$(XLA)/bin/python $(PIP) install $(XLA_TORCH) || { echo "$(XLA_TORCH) cannot be" \
	    "installed with Python $(VERSION) here: the tests on XLA have NOT run" >&2; exit 1; }
	@echo "installing tensortap and the tools for its tests into $(XLA)"
	@grep -v '^torch==' constraints.txt > $(XLA)/constraints.txt
	@$(XLA)/bin/python $(PIP) install -c $(XLA)/constraints.txt $(BUILD_TOOLS) \
	    pytest pytest-xdist hypothesis
	@$(XLA)/bin/python $(PIP) install -c $(XLA)/constraints.txt --no-build-isolation \
	    -e packages/core -e "packages/hf[framework]" -e packages/neuron -e packages/analysis
	@touch $@
