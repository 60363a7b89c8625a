PROFILE ?= mini
DEVICE ?= cpu
SEEDS ?= 5
SAES ?= 2
NAME ?= organism
SEED ?= 0
BLOCKS ?= 2 3 8 9
SCALE ?= 1
PROCESSES ?= 1
RUNS ?= 5
FROM ?= notebooks
WORLDS ?= $(if $(filter mini,$(PROFILE)),seeds,seeds-$(notdir $(basename $(PROFILE))))
ENV ?= auto
PYTHON ?= python3
VENV := .venv/bin/python
SETS = $(foreach one,$(SET),--set "$(one)")
# A bundle's wheels, where they lie here; with a network they can be passed over: make env WHEELS=
WHEELS := $(if $(wildcard wheels/*.whl),--no-index --find-links wheels)

export PYTHONPATH := $(CURDIR)
export OMP_WAIT_POLICY ?= PASSIVE
# two at a time share the cores: threads that wait sleep at once
test test-all faults: export GOMP_SPINCOUNT = 0

# The active interpreter when it satisfies the lock (or when ENV=active says so), else .venv, made from the lock.
ifeq ($(ENV),active)
RUN := $(PYTHON)
else
RUN := $(shell $(PYTHON) -m stetholib.commands.environment 2>/dev/null && echo $(PYTHON) || echo $(VENV))
endif

.DEFAULT_GOAL := help
.PHONY: help env reproduce doctor rehearse seeds claim export page bundle check-laptop test test-all faults bench mini-base organism organisms lab lint readme publish slides clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

env:  ## the environment alone: .venv from requirements.lock, or the active one where it satisfies the lock
ifeq ($(ENV),active)
	@$(RUN) -m stetholib.commands.environment --warn || true
else ifeq ($(RUN),$(VENV))
	@test -x $(VENV) || $(PYTHON) -m venv .venv
	@$(VENV) -m stetholib.commands.environment --installed || { \
	  echo "installing requirements.lock into .venv (once, some minutes) ..."; \
	  $(VENV) -m pip install --quiet --disable-pip-version-check $(WHEELS) -r requirements.lock && \
	  $(VENV) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . || \
	  { echo "the environment was not made; make check-laptop says what this machine lacks"; exit 1; }; }
endif

reproduce: env  ## the six notebooks, every table and figure: make reproduce [PROFILE=mini] [DEVICE=cpu] [SET="selection.layer_share=0.25"]
	@$(RUN) -m stetholib reproduce --profile $(PROFILE) --device $(DEVICE) --processes $(PROCESSES) $(SETS)

doctor: env  ## what this machine lacks for a profile: make doctor PROFILE=paper [DEVICE=cuda]
	@$(RUN) -m stetholib doctor --profile $(PROFILE) --device $(DEVICE) $(SETS)

rehearse: env  ## a profile's notebooks on fabricated weights, for time and memory: make rehearse PROFILE=paper [SCALE=1]
	@$(RUN) -m stetholib rehearse --profile $(PROFILE) --device $(DEVICE) --scale $(SCALE)

seeds: env  ## the experiment in several worlds, how often each claim holds: make seeds [SEEDS=5] [PROCESSES=1]
	@$(RUN) -m stetholib seeds --profile $(PROFILE) --device $(DEVICE) --count $(SEEDS) --into $(WORLDS) --processes $(PROCESSES)

organisms: env  ## every rule in models whose layers of mathematics are known: make organisms [SAES=2]
	@$(RUN) -m stetholib organisms --device $(DEVICE) --count $(SAES)

claim: env  ## one claim of the paper checked alone: make claim CLAIM=C3 [PROFILE=mini]
	@$(RUN) -m stetholib claim --claim "$(CLAIM)" --profile $(PROFILE) --device $(DEVICE)

export: env  ## an edited model as a folder that any tool loads: make export VARIANT=stethoscope [PROFILE=mini] [INTO=folder]
	@$(RUN) -m stetholib export --variant "$(VARIANT)" --profile $(PROFILE) --device $(DEVICE) $(if $(INTO),--into "$(INTO)")

page: env  ## one page that needs nothing, with the miniature live in it: make page [PROFILE=mini]
	@$(RUN) -m stetholib page --profile $(PROFILE) --device $(DEVICE)

test: env  ## the tests of every day: offline, at most five minutes on two cores
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow and not campaign" --cov=stetholib --cov-report=term

test-all: env  ## every test, whole runs, kills and bad input among them: about 50 minutes on two cores
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25 -m "not campaign"

faults: env  ## the campaign: 23 kills of smoke and 8 of mini, runs side by side, three worlds, and the rung in the middle (some four hours)
	$(RUN) -m pytest -q -m campaign -s tests

bench: env  ## ours beside its peers, about 75 minutes on two quiet cores: make bench [WORKS="answer edit"] [RUNS=5] [SCALE=1]
	@$(RUN) -m bench --works $(WORKS) --runs $(RUNS) --scale $(SCALE) $(if $(REPRODUCE),--reproduce)

mini-base: env  ## train the miniature's base model anew (it ships with the package; about half an hour)
	$(RUN) -m stetholib.data.mini.base --device $(DEVICE)

organism: env  ## train an organism anew: make organism NAME=organism SEED=0 BLOCKS="2 3 8 9" (they ship; some 40 minutes each)
	$(RUN) -m stetholib.data.mini.organism --device $(DEVICE) --folder stetholib/data/mini/$(NAME) --seed $(SEED) --blocks $(BLOCKS)

lab: env  ## JupyterLab on the notebooks
	$(RUN) -m jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/01_task_vectors.ipynb

bundle: env  ## a folder for laptops without a network: make bundle [INTO=x.tar] [PLATFORM="linux-x86_64 macos-arm64"] [PYTHONS="3.11 3.12"]
	@$(RUN) -m stetholib bundle $(if $(INTO),--into "$(INTO)") $(if $(PLATFORM),--platform $(PLATFORM)) $(if $(PYTHONS),--python $(PYTHONS))

check-laptop:  ## will this laptop do, and what to mend: before anything is installed, with any python3
	@$(PYTHON) stetholib/commands/laptop.py

lint: env  ## style, types and declared dependencies: ruff, mypy, deptry
	$(RUN) -m ruff check stetholib bench tests notebooks
	$(RUN) -m ruff format --check stetholib bench tests notebooks
	$(RUN) -m mypy stetholib bench
	$(RUN) -m deptry .

slides: env  ## the notebooks' figures and questions as slides that need no network: runs/slides/ [FROM=runs/mini/notebooks]
	@$(RUN) -m nbconvert --log-level ERROR --to html --template slides --TemplateExporter.extra_template_basedirs=notebooks \
	  --output-dir runs/slides $(FROM)/0*.ipynb

clean:  ## remove what runs produced (figures/mini, which is committed, stays)
	rm -rf runs

readme: env  ## write the READMEs' findings, ledger, rules and table of peers from figures/
	@$(RUN) -m stetholib.commands.readme

publish: env  ## put what the last run of the miniature shows into the committed notebooks
	@$(RUN) -m stetholib.commands.publish
