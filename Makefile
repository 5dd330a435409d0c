# Each target runs in .venv, which .ci/environment.py makes and keeps complete, or in an interpreter of
# your own: make test PYTHON=/path/to/python. ARGS go to the program: make bench ARGS="--quick".
PYTHON =
ARGS =

in_environment = "$(or $(PYTHON),python3)" .ci/environment.py $(if $(PYTHON),--own)
clang_format = -c 'import clang_format; clang_format.clang_format()'
cpp_files = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.hpp')

.PHONY: bench test packages lint sanitize kernels cuda-build gpu-check format clean

bench: ## measure against torch.nn.LSTM
	@$(in_environment) bench -m benchmarks $(ARGS)

test: ## run the tests
	@$(in_environment) test -m pytest $(ARGS)

packages: ## build the source archive and the wheel, and try the wheel
	@$(in_environment) test .ci/check_packages.py

lint: ## what CI checks besides the tests
	$(in_environment) dev -m ruff check .
	$(in_environment) dev -m ruff format --check .
	$(in_environment) dev -m mypy
	$(in_environment) dev $(clang_format) --dry-run --Werror $(cpp_files)

sanitize: ## run the CPU kernels under the compiler's sanitizers
	@$(in_environment) test tests/sanitize $(ARGS)

kernels: ## compile the CUDA kernels for each architecture; needs nvcc, no GPU
	@$(in_environment) dev .ci/check_kernels.py $(ARGS)

cuda-build: ## build against a CUDA build of torch and try it; needs nvcc and 6 GB, no GPU
	@"$(or $(PYTHON),python3)" .ci/check_cuda_build.py $(ARGS)

gpu-check: ## on a machine with a GPU: build, tests, sanitizers, microbenchmarks, benchmarks
	@$(in_environment) test -m benchmarks.gpu_check $(ARGS)

format: ## rewrite files in the project's format
	$(in_environment) dev -m ruff check --fix .
	$(in_environment) dev -m ruff format .
	$(in_environment) dev $(clang_format) -i $(cpp_files)

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info lstm_cuda/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
