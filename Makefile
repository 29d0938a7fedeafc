# make demo   the whole path on drawn patches, a report at the end (about 5 minutes on 2 cores)
# make study NAME=projection_grid   a study of tune/studies in smoke size, on the demo's patches
# make watch   Prometheus on localhost:9090, of the Ray that runs here (docs/monitoring.md)
# make test   is a change right?                  make lint   format, lint and types
# make test-faults   kills, outages, two simulated machines, Prometheus, a browser: needs root and `make system-packages`
# make system-packages   apt-get install what make test-faults needs
# make fuzz   sets, tables, studies and runs that a stranger might send (minutes; FUZZ_EXAMPLES=10000 for a night)
# make soak   injects 24 faults into a run on two simulated machines, results to benchmarks/results (about 35 minutes)
# make bench-smoke   is something of ours slower than it was? Ratios against benchmarks/smoke.json (a minute, ARGS=--update writes it)
# make gpu-check   one command for a host with a GPU (DRY=1 for the same on a CPU)
# make gpu-bench   every figure that only a GPU shows, in 8 minutes (DRY=1 on a CPU, DATA=shards/oral to pretrain on a set of yours)
# make reference   docs/reference.md, from the scripts' configs
# The first of them makes the virtual environment (about 5 minutes, 5 GB); the others find it made.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
INSTALLED := $(VENV)/installed
PROCESSES ?= 2

.PHONY: demo study watch test test-faults fuzz system-packages soak lint bench-smoke gpu-check gpu-bench clean-demo reference
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PatchCLR needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the versions of constraints.txt into $(VENV) (about 5 minutes, 5 GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# In two processes, which take 4 GB. One thread each: tiny models gain nothing from more.
# A process that crashes ends the run: pytest-xdist may wait for ever after it has replaced one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: $(INSTALLED)
	$(PYTEST) -m "not faults" $(ARGS)

# Half of its time is waiting, for Ray and for time-outs. On a busy machine: make test-faults PROCESSES=1
test-faults: $(INSTALLED)
	$(PYTEST) -m faults $(ARGS)

fuzz: export FUZZ_EXAMPLES ?= 500
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --timeout 0 $(ARGS)

system-packages:
	.ci/system-packages

# Of two machines, made of namespaces; needs root and openssh-server.
soak: $(INSTALLED)
	$(BIN)/python -m pytest tests/cluster/soak.py -s $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The commands that a user types, on drawn patches. Each says so and goes on where it was when it is run again.
DRAWN := run() { echo; echo "$$ $$*"; "$$@"; }; PATH="$$PWD/$(BIN):$$PATH"; \
	run python sharding/synthetic.py --out $(DEMO)/images/kidney --organ kidney --patches 1536 --size 96 --slides 12 --seed 1; \
	run python sharding/synthetic.py --out $(DEMO)/images/breast --organ breast --patches 1800 --size 96 --slides 24 --seed 2; \
	run python sharding/build.py $(DEMO)/images/kidney --out $(DEMO)/shards/kidney --layout "{slide}/{name}" --group-by slide --unlabelled; \
	run python sharding/build.py $(DEMO)/images/breast --out $(DEMO)/shards/breast --layout "{class}/{slide}/{name}" --group-by slide \
		--split train=0.7,test=0.3;

demo: $(INSTALLED)
	@bash -c 'set -e -o pipefail; started=$$SECONDS; $(DRAWN) \
	run python tune/grid.py tune/studies/demo.yaml; \
	echo; echo "The demo took $$((SECONDS - started)) s."'

# The smoke sizes begin from weights drawn at random where the studies begin from ImageNet's, which need a network.
study: $(INSTALLED)
	@test -f tune/studies/$(NAME).yaml || { echo "make study NAME=...: one of $(notdir $(basename $(wildcard tune/studies/*.yaml)))"; exit 2; }
	@bash -c 'set -e -o pipefail; started=$$SECONDS; $(DRAWN) \
	run python tune/random_weights.py --backbone test_resnet --out $(DEMO)/weights/random_in_place_of_imagenet.safetensors; \
	run python tune/grid.py tune/studies/$(NAME).yaml --smoke; \
	echo; echo "The study took $$((SECONDS - started)) s."'

# Debian's: apt-get install --no-install-recommends prometheus
watch:
	@command -v prometheus >/dev/null || { echo "make watch needs prometheus: apt-get install --no-install-recommends prometheus"; exit 2; }
	prometheus --config.file=monitoring/prometheus.yml --web.listen-address=127.0.0.1:9090 \
		--storage.tsdb.path=$(HOME)/.local/share/patchclr/prometheus --storage.tsdb.retention.time=90d

reference: $(INSTALLED)
	$(BIN)/python docs/make_reference.py

clean-demo:
	rm -rf $(DEMO)

bench-smoke: $(INSTALLED)
	$(BIN)/python benchmarks/smoke.py $(ARGS)

gpu-check: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_bench.py --out benchmarks/results --parts check --seconds 240 $(if $(DRY),--dry)

gpu-bench: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_bench.py --out benchmarks/results $(if $(DRY),--dry) $(if $(DATA),--data $(DATA))
