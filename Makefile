# `make quickstart` and `make test` do all of their set-up; only Rust's toolchain must be there.

CARGO ?= cargo
# The one profile everything is built in, so that dependencies are compiled once.
PROFILE := --release
VCYCLE := $(or $(CARGO_TARGET_DIR),target)/release/vcycle

.DEFAULT_GOAL := help
.PHONY: help deps build quickstart test test-slurm test-net test-software-gpu fmt clippy cuda-kernels cuda-clippy docs clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | column -t -s '	' 2>/dev/null || grep '##' $(MAKEFILE_LIST)

deps: ## Install the system packages that are missing (apt-get, root or sudo)
	@scripts/install-deps.sh

build: deps ## Build the program: target/release/vcycle
	$(CARGO) build $(PROFILE) --locked

quickstart: build ## Train by a multilevel cycle and by its baseline; show what was saved (minutes)
	@scripts/quickstart.sh $(VCYCLE)

test: ## Run all tests
	@scripts/install-deps.sh test
	$(CARGO) test $(PROFILE) --locked

test-slurm: build ## Train under a Slurm of this machine: stop, requeue, continue; a scaling study (root)
	@tests/slurm/run.sh $(VCYCLE)

test-net: build ## Train on several hosts, network namespaces of this machine; cut one off (root)
	@tests/net/run.sh $(VCYCLE)

test-software-gpu: deps ## Run the CUDA build on a GPU made of software: tests, runs of every kind (20 minutes)
	@tests/software-gpu/run.sh target/software-gpu

fmt: ## Format the code
	$(CARGO) fmt

clippy: deps ## Lint, with MPI and without
	$(CARGO) clippy $(PROFILE) --locked --all-targets -- -D warnings
	$(CARGO) clippy $(PROFILE) --locked --all-targets --no-default-features -- -D warnings

# CUDA's compiler, from PyPI, for a machine that has none. CUDA_TOOLKIT names its folder.
CUDA_TOOLKIT ?= target/cuda-toolkit
WITH_CUDA := eval "$$(scripts/cuda-toolkit.sh $(CUDA_TOOLKIT))" &&

cuda-kernels: ## Compile the CUDA kernels alone, for sm_80 and sm_90 (minutes; no GPU)
	@mkdir -p target/cuda-kernels
	$(WITH_CUDA) nvcc --options-file src/ops/cuda/nvcc.options -lib --threads 0 \
		-o target/cuda-kernels/libvcycle_kernels.a src/ops/cuda/*.cu

cuda-clippy: deps ## Lint with the feature `cuda` (compiles candle anew: minutes; no GPU)
	$(WITH_CUDA) $(CARGO) clippy $(PROFILE) --locked --all-targets --features cuda -- -D warnings

docs: build ## Regenerate docs/CONFIG.md
	$(VCYCLE) config-reference > docs/CONFIG.md

clean: ## Remove what the quick start wrote (`cargo clean` removes the build)
	rm -rf quickstart
