PYTHON ?= python
CODE = modeling data training evaluation hub commands tasks benchmarks run_pretraining.py run_tokenizer.py run_finetune.py run_evaluation.py

.PHONY: style check test test-slow test-gpu test-oldest survival distributed

style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy $(CODE)
	$(PYTHON) -m mypy --strict modeling
	$(PYTHON) -m codespell_lib .

test:
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow:
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow

test-gpu:
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -m gpu tests/test_gpu.py

# The same tests on the oldest supported libraries, in an environment of their own (about 5 GB with PyPI's torch for GPUs).
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -r requirements.txt -c constraints-oldest.txt faster-coco-eval pytest pytest-timeout pytest-xdist
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Kills, faults and damaged images, and a dated table in benchmarks/ (benchmarks/survival.py); it may be stopped and continued.
survival:
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.survival

# The same loss on one process, on four, on two "computers" of two processes, and with FSDP2 (benchmarks/distributed.py).
distributed:
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.distributed
