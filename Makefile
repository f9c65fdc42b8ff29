# make train   fresh machine: environment, built-in dataset, a few minutes of training, metrics, pictures
# make test    fresh machine: environment, all tests that need neither a GPU, nor a network, nor minutes
# make fast    the tests of ops, models, losses and data in under a minute, while editing
# make check   lint, types and tests, before each commit
# make slow    the tests of several minutes each
# make faults  what happens when things break: kill -9, full disks, dead ranks, hostile files (under 20 minutes)
# make bench   the benchmarks that need no GPU, one table each (under 10 minutes)
# make gpu     what waits for a GPU: its tests, its rows of docs/performance.md, one training; one file of results (12 minutes)
# make clean   remove the environment and the built-in dataset (never runs or weights)

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 12
RUN = $(VENV)/bin/python
# Two processes of one thread each: a file's tests stay together, they share what is slow to make.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile
BENCHMARKS = matmul training_step loss optimizer loader nms evaluation logs annotations start_up memory checkpoint inference

.PHONY: train test fast check slow faults bench gpu clean

train: $(VENV)/ready
	$(RUN) yolo-v3/main.py --config recipes/quickstart.yaml

test: $(VENV)/ready-dev
	$(TEST)

# Without the files that start processes, make the built-in dataset or write whole weight files.
fast: $(VENV)/ready-dev
	$(TEST) tests/ops tests/models tests/data $(addprefix --ignore=tests/,data/test_loaders.py data/test_image_cache.py \
		data/test_digits.py models/test_pretrained.py models/darknet/test_darknet_export.py)

check: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(TEST)

slow: $(VENV)/ready-dev
	$(RUN) -m pytest -q -m slow

faults: $(VENV)/ready-dev
	$(TEST) -m faults

bench: $(VENV)/ready-dev
	for name in $(BENCHMARKS); do echo "== $$name"; $(RUN) -m benchmarks.$$name || exit 1; done

gpu: $(VENV)/ready-dev
	$(RUN) -m benchmarks.gpu --minutes $(MINUTES)

clean:
	rm -rf $(VENV) data/digits .pytest_cache .mypy_cache .ruff_cache

# The marker files come last, so a broken installation is repeated.
$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
