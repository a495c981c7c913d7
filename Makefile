# `make demo` sets up and runs the main job, `make check` sets up and passes the tests, the docs' build
# among them; `make docs` writes the settings' tables anew and builds the site into site/.
# Bytecode is compiled at once: where it is not kept (PYTHONDONTWRITEBYTECODE), every start of a process
# would compile torch and lightning again, which takes longer than importing them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = outputs/demo

.PHONY: demo check lint types test docs lowest transformers5

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action ignore uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --editable '.[test,docs]'
	touch $@

demo: $(VENV)/installed
	@mkdir -p $(dir $(RUN))
	@echo "Merging and repairing; FusionBench's own words go to $(RUN).txt"
	$(BIN)/fusion_bench +experiment=quiet method=intervmerge/compare path.log_dir=$(RUN) \
	  modelpool=clip-vit-mini_TA8 taskpool=clip-vit-mini_TA8 >$(RUN).txt
	$(BIN)/intervmerge report $(RUN) --to $(RUN)/report

check: lint types test

lint: $(VENV)/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: $(VENV)/installed
	$(BIN)/mypy

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(VENV)/installed
	$(BIN)/python docs/settings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The oldest releases that pyproject.toml allows: the published numbers, artifacts, the main job.
lowest: VERSIONS = --resolution lowest-direct
lowest: TESTED = artifact embedded_pool functions model towers
lowest: MORE = tests/test_command.py::test_the_main_job_reports_what_it_did
# The core has no FusionBench, which does not run beside transformers 5.
transformers5: VERSIONS = --override $(VENV)-transformers5/newer.txt
transformers5: TESTED = calibration distillation files functions model placement recalibration \
  routing solving states storage towers

lowest transformers5: $(VENV)/installed
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(VENV)-$@
	printf 'transformers>=5\nhuggingface_hub>=1\n' > $(VENV)-$@/newer.txt
	$(BIN)/uv pip install --quiet --python $(VENV)-$@ $(VERSIONS) --editable '.[test]'
	[ $@ = lowest ] || $(BIN)/uv pip uninstall --quiet --python $(VENV)-$@ fusion-bench
	OMP_NUM_THREADS=1 $(VENV)-$@/bin/python -m pytest $(TESTED:%=tests/test_%.py) $(MORE)
