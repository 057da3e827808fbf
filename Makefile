# make book, make test, make gpu: each sets everything up by itself; Python 3.11 or newer is all they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# The tensors are small: a second thread would mostly wait, and longer on a busy machine.
export OMP_NUM_THREADS := 1

.PHONY: book serve colab colab-test oldest-test pdf test gpu lock clean

book: $(INSTALLED)
	$(BIN)/nbdev_export
	$(BIN)/jupyter-book build nbs --config _config.yml --toc "$(CURDIR)/_toc.yml" \
		--path-output . -W -n --keep-going -q
	@test -f _build/html/index.html
	@echo "The book is in _build/html/index.html; 'make serve' opens it."

serve: book
	(sleep 1; $(BIN)/python -m webbrowser -t http://localhost:8000) &
	$(BIN)/python -m http.server 8000 --bind localhost --directory _build/html

# Minutes, and a browser (Chromium or Chrome).
pdf: book
	$(BIN)/python _ext/book_pdf.py _build/po_book.pdf
	cp _build/po_book.pdf _build/html/

# The notebooks that readers open in Colab, from what the book has run.
colab: book
	$(BIN)/jupyter-book build nbs --config _config.yml --toc "$(CURDIR)/_toc.yml" \
		--path-output . --builder custom --custom-builder colab -W -n --keep-going -q

# All of them, in a new environment with what Colab has; about as long as a first `make book`.
colab-test: colab
	$(PYTHON) -m venv --clear _build/colab-env
	_build/colab-env/bin/pip install -q -r benchmarks/colab.txt
	_build/colab-env/bin/python benchmarks/colab.py _build/colab/*.ipynb

# All of them with the oldest releases that settings.ini allows.
oldest-test: colab
	$(PYTHON) -m venv --clear _build/oldest-env
	$(BIN)/uv pip install -q --python _build/oldest-env/bin/python --resolution lowest-direct \
		".[agents,demos,grade,math,peft,video]"
	$(BIN)/uv pip install -q --python _build/oldest-env/bin/python ipykernel nbclient nbformat pip
	_build/oldest-env/bin/python benchmarks/colab.py _build/colab/*.ipynb

# The tests look at the built book. The longest chapters have been run by the build, which
# stops at a cell that fails; `nbdev_test` without the pattern runs them once more.
test: colab
	$(BIN)/nbdev_test --n_workers 2 --timing --skip_file_re '^(15|22|36|38|42|45|46|49|50)_'
	$(BIN)/pytest -n 2 --dist worksteal

# Where there is a CUDA card: runs what needs one, and records it into results/.
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py $(GPU)

# torch asks for the accelerator packages of its own build, where it has one.
lock: $(INSTALLED)
	$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 \
		--no-annotate --no-header --upgrade -q \
		| grep -v -E '^(cuda-|nvidia-|triton)' > requirements-dev.txt

clean:
	rm -rf _build build dist *.egg-info

$(INSTALLED): requirements-dev.txt setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"Python 3.11 or newer is needed: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@
