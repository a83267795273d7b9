.PHONY: style quality test lock

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .
	mypy

test:
	bash scripts/test.sh

# Keeps every version that still fits; `make lock UPGRADE=--upgrade` takes the newest. Needs uv (pip install uv).
lock:
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" $(UPGRADE) \
		--output-file constraints.txt requirements.txt tests/requirements.txt tests/consumers/requirements.txt
