# Needs Python 3.11 or newer (with venv) and make; no root, no server. Everything is installed into .venv.

PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check
# Tests mostly wait: two at a time take little more than half the time, and none shares a server's part with another.
PYTEST = .venv/bin/python -m pytest --numprocesses=2 --dist=worksteal
RELOCK = .venv/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" pyproject.toml

.PHONY: help .venv demo test lint slow mqtt conformance chaos bench lock clean

help: ## Show this list
	@grep -E '^[.a-z]+:.* ## ' Makefile | sed -E 's/:.* ## /\t/' | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-12s %s\n' "$$name" "$$what"; done

.venv: .venv/.dev ## Create the environment that development needs

# A folder's name may hold what make or the shell would expand: it reaches the demo through the environment, as it is.
unexport INPUT
demo: export DEMO_INPUT := $(value INPUT)
demo: .venv/.runtime ## Resize and convert a folder of images and show it: make demo INPUT=~/Pictures
	@.venv/bin/python examples/demo.py $${DEMO_INPUT:+--input "$$DEMO_INPUT"}

test: .venv/.dev ## Run the tests but the slow ones; pytest's own arguments in ARGS: make test ARGS="-k broker"
	@$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/.dev ## Check style, types and the direction of imports
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check . || { .venv/bin/ruff format --check . ; exit 1; }
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

slow: .venv/.dev ## Run the slow tests: workers that are killed and stopped in every way, on every broker
	@$(PYTEST) -m slow --ignore tests/mqtt $(ARGS)

mqtt: .venv/.dev ## Run the slow tests against real Mosquittos: wills, outages, TLS, long runs
	@$(PYTEST) -m slow tests/mqtt $(ARGS)

conformance: .venv/.dev ## Run kombu's own transport conformance classes on the embedded broker
	@.ci/conformance.sh

chaos: .venv/.dev ## Kill, stop and starve workers and servers for long, and count what is lost: make chaos ARGS="redis --seed 7"
	@.venv/bin/python -m tests.chaos $(ARGS)

bench: .venv/.dev ## Measure, side by side with other ways to do the same; arguments in ARGS
	@.venv/bin/python -m benchmarks $(ARGS)

# The runtime lock takes its versions from the development lock, so that both fit into one .venv.
lock: ## Lock the dependencies anew, at their newest versions
	@test -x .venv/bin/uv || $(MAKE) .venv
	@$(RELOCK) --upgrade --all-extras --group dev --output-file requirements/dev.txt
	@$(RELOCK) --upgrade --constraint requirements/dev.txt --extra image --extra heif --extra flower --group build \
		--no-annotate --output-file requirements/runtime.txt
	@echo "Locked: requirements/dev.txt, requirements/runtime.txt"

clean: ## Remove the environment and all caches
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .conformance build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python
python: # Say which Python .venv would be made with
	@$(find_python); command -v "$$python"

# The stamps are newer than the lock and pyproject.toml as long as the environment matches them. The development
# environment holds all that the runtime needs.
.venv/.dev: requirements/dev.txt pyproject.toml
	@$(call install,requirements/dev.txt)
	@touch .venv/.runtime .venv/.dev

.venv/.runtime: requirements/runtime.txt pyproject.toml
	@$(call install,requirements/runtime.txt)
	@touch .venv/.runtime

# An environment whose Python is gone (upgraded, moved) is made anew.
define install
	set -e; \
	if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then \
		$(find_python); \
		echo "Creating .venv with $$($$python --version) ($$python)"; \
		"$$python" -m venv --clear .venv; \
	fi; \
	echo "Installing $(1) (a minute, the first time)"; \
	$(PIP) install --require-hashes --requirement $(1); \
	$(PIP) install --no-deps --no-build-isolation --editable .
endef

# Some machines have an older python3 and a newer one beside it; Debian has Pythons without ensurepip.
# PYTHON=/path/to/python3.12 chooses one.
define find_python
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			break; \
		fi; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer with venv was found$(if $(PYTHON), as $(PYTHON),)." >&2; \
		echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python)," >&2; \
		echo "or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
endef
