# `make train` and `make test` do everything on a bare machine with Python 3.11, 3.12 or 3.13: environment, install, run.
# Another interpreter: make train PYTHON=/path/to/python

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

BIN := .venv/bin
STACK := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCHREC_1_6 := $(CURDIR)/.venv/torchrec-1.6.1
# These touch torchrec, and run once more against the older release that is supported.
TORCHREC_TESTS := tests/data/test_batch.py tests/data/test_batches.py tests/models $(addprefix tests/distributed/test_, \
  capacity.py checkpoint.py dlrm_pipelines.py optimizers.py pipeline.py plan.py shard.py tables.py) \
  $(addprefix tests/training/test_run.py::test_, a_run_leaves_all_that_the_readme_promises \
  evaluating_a_run_gives_the_figures_it_ended_with another_optimizer_on_resume_is_refused_unless_reset)

# Written when an install is complete, so an interrupted one is begun anew. It names the stack and the folder, which a virtual
# environment does not survive the change of.
READY := .venv/.ready
READY_FOR := $(STACK) $(CURDIR)
INSTALLS := pyproject.toml requirements/common.txt requirements/$(STACK).txt packaging/fbgemm-gpu-shim/pyproject.toml

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help train test test-slow lint gpu-check clean always

help:
	@echo 'make train      train TiM4Rec on generated data: two processes, one sharded item table; results in runs/'
	@echo 'make test       the tests, on torchrec 1.8.0, then those that touch torchrec on 1.6.1'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make lint       ruff and pyright'
	@echo 'make gpu-check  every test and benchmark on the GPU of this machine'
	@echo 'make clean      remove the environment and caches; runs/ stays'

# Without GPUs .torchxconfig says how many processes; with GPUs it is one each, at most two for the small generated data.
train: GPUS := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU' | head -2 | wc -l)
train: $(READY)
	$(BIN)/torchx run torchx_components/train.py:tim4rec $(if $(filter cuda,$(STACK)),-j 1x$(GPUS))

# A thread per process and a process per core: tests start worlds of two, and small tensors gain nothing from more threads.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(READY) $(TORCHREC_1_6)/.ready
	$(BIN)/python -m pytest -q -n auto --dist loadgroup
	PYTHONPATH=$(TORCHREC_1_6) $(BIN)/python -c 'import importlib.metadata as m; assert m.version("torchrec") == "1.6.1"'
	PYTHONPATH=$(TORCHREC_1_6) $(BIN)/python -m pytest -q -n auto --dist loadgroup $(TORCHREC_TESTS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# With PYTHON given, that interpreter runs the checks as it is: for a GPU host whose packages are already in place.
# PART=tests, selftest, ops, encoders, dlrm, scale, lifelong, profile or rest; OUTPUT=FOLDER of the results; BUDGET_S=SECONDS after which a part stops, to go on next time.
gpu-check: CHECKER := $(or $(PYTHON),$(BIN)/python)
gpu-check: $(if $(PYTHON),,$(READY))
	PYTHONPATH=.:$${PYTHONPATH:-} $(CHECKER) -m benchmarks.gpu_check \
	  $(if $(PART),--part $(PART)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(BUDGET_S),--budget-s $(BUDGET_S))

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info build packaging/*/build packaging/*/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(shell cat $(READY) 2>/dev/null),$(READY_FOR))
$(READY): always
endif

$(READY): $(INSTALLS)
	@rm -f $@
	@python=$$(PYTHON='$(PYTHON)' packaging/find-python); \
	echo "Installing requirements/$(STACK).txt into .venv with $$python, once; a minute or two."; \
	"$$python" -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --requirement requirements/$(STACK).txt
	@$(BIN)/python -m pip check
	@echo '$(READY_FOR)' >$@

$(TORCHREC_1_6)/.ready: $(READY)
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(@D) torchrec==1.6.1 iopath==0.1.10 portalocker==4.4.2
	@touch $@
