# Short names for single commands. `make` alone lists them.
PYTHON ?= python3
# The versions that the project file declares.
PYTHONS ?= 3.11 3.12 3.13
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
EXTRAS := .venv-extras
AGENTS := .venv-agents
UI := .venv-ui
# A network of their own that holds nothing but loopback.
LOOPBACK_ONLY := unshare --user --map-root-user --net sh -c 'ip link set lo up && exec sh -c "$$0"'
# Installed once with everything that development needs; repeated when the project file changes.

.PHONY: test-user templates coverage count sbom test-versions record-open-webui docs screens help setup run test test-agents test-clients test-extras test-open-webui test-slow test-ui soak soak-day fuzz check lint types imports format bench bench-swaps demo-model clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

setup: $(INSTALLED) ## make .venv and install the project into it

run: $(INSTALLED) ## start the router with the bundled demo model
	$(BIN)/mlx-router start

test: $(INSTALLED) ## all tests that a change has to pass
	$(BIN)/python -m pytest --numprocesses 4 -m "not slow"

test-user: ## the same as an ordinary user, in a copy of the working tree, when called by root
	.ci/as-user make test

test-slow: $(INSTALLED) ## those that take long: large models, many failures, a service through its life
	$(BIN)/python -m pytest --numprocesses 2 -m slow

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/requirements-litellm.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)/litellm
	$(CLIENTS)/litellm/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements-litellm.txt
	cd tests/clients && PATH="$(abspath $(CLIENTS))/bin:$$PATH" npm install --no-save --no-package-lock --ignore-scripts --no-fund --no-audit --loglevel error
	touch $@

test-clients: $(INSTALLED) $(CLIENTS)/.installed ## client programs of others, installed apart
	$(BIN)/python -m pytest tests/clients

$(EXTRAS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,encoders,vision]'
	touch $@

test-extras: $(EXTRAS)/.installed ## encoders, rerankers and vision, with the extras they need
	$(EXTRAS)/bin/python -m pytest tests/extras

$(UI)/.installed: pyproject.toml
	.ci/chromium
	$(PYTHON) -m venv $(UI)
	$(UI)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,ui]'
	touch $@

test-ui: $(UI)/.installed ## the page in headless Chromium; SHOTS=docs/ui writes pictures
	MLX_ROUTER_SHOTS=$(SHOTS) $(UI)/bin/python -m pytest --numprocesses 2 tests/ui

$(AGENTS)/.installed: tests/agents/install.sh
	PYTHON=$(PYTHON) tests/agents/install.sh $(AGENTS)
	touch $@

$(AGENTS)/.webui-installed: tests/agents/install.sh
	PYTHON=$(PYTHON) tests/agents/install.sh $(AGENTS) webui
	touch $@

test-agents: $(INSTALLED) $(AGENTS)/.installed ## coding agents, installed apart, with no network but loopback (Linux)
	$(LOOPBACK_ONLY) '$(BIN)/python -m pytest --timeout 180 tests/agents/test_agents.py'

test-open-webui: $(INSTALLED) $(AGENTS)/.webui-installed ## Open WebUI, several gigabytes, with no network but loopback (Linux)
	$(LOOPBACK_ONLY) '$(BIN)/python -m pytest --timeout 300 tests/agents/test_open_webui.py'

record-open-webui: $(INSTALLED) $(AGENTS)/.webui-installed ## write down anew what Open WebUI asks
	$(BIN)/python -m tests.recorded

soak: $(INSTALLED) ## ten minutes of chaos with real processes; MINUTES=10
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10)

soak-day: $(INSTALLED) ## a day's loads and idles in some minutes; LOADS=3000
	$(BIN)/python -m tests.soak.day --loads $(or $(LOADS),3000)

fuzz: $(INSTALLED) ## random and nearly right requests on every route; MINUTES=5
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),5)

check: lint types imports count test ## what the continuous integration runs

lint: $(INSTALLED) ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

count: $(INSTALLED) ## how many tests there are; never fewer than before
	$(BIN)/python -m tests.meta.count

coverage: $(INSTALLED) ## branches of the lifecycle that its own tests reach: 95 % at least
	$(BIN)/python -m coverage run --branch --source router/mlx_router_server/lifecycle -m pytest -q -n 0 tests/unit -k lifecycle
	$(BIN)/python -m coverage report --fail-under 95 --skip-covered

test-versions: ## unit and meta tests on each Python that is declared; PYTHONS="3.12"
	for version in $(PYTHONS); do \
	  python=$$(.ci/python $$version) || { echo "there is no Python $$version on this machine"; exit 1; }; \
	  $(MAKE) --no-print-directory setup PYTHON=$$python VENV=.venv-$$version || exit 1; \
	  .venv-$$version/bin/python -m pytest -q -n 2 tests/unit tests/meta tests/acceptance/test_demo_script.py || exit 1; \
	done

.venv-sbom/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet --disable-pip-version-check .
	$(PYTHON) -m venv .venv-sbom/tool
	.venv-sbom/tool/bin/python -m pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	touch $@

sbom: .venv-sbom/.installed ## what an installation consists of, as CycloneDX, in dist/
	mkdir -p dist
	.venv-sbom/tool/bin/cyclonedx-py environment --output-reproducible --of JSON -o dist/sbom.cdx.json .venv-sbom/bin/python

types: $(INSTALLED) ## strict type checks
	$(BIN)/mypy

imports: $(INSTALLED) ## who may import whom
	$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure; writes docs/benchmarks.md
	$(BIN)/python -m tests.bench

bench-swaps: $(INSTALLED) ## 200 swaps of 1 GB; writes docs/benchmarks-swaps.md
	$(BIN)/python -m tests.bench.many_swaps

demo-model: $(INSTALLED) ## train the bundled demo model anew (minutes)
	$(BIN)/python -m tests.tiny_models.train_demo

clean: ## remove what the other commands made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

templates: $(INSTALLED) ## conversations through every chat template of a folder: DIR=…
	$(BIN)/python -m tests.templates $(or $(DIR),tests/templates)

screens: $(INSTALLED) ## type the commands into a terminal (tmux) and write docs/cli.md
	$(BIN)/python -m tests.screens

docs: $(INSTALLED) ## render the parts of docs/ and configs/ that come from the code
	$(BIN)/python -m tests.meta.render_docs
