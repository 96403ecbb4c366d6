PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TRITON := triton==3.7.1

SPACE ?= user/hieratok
WEB ?= build/web
WEB_MODEL ?= hieratok-tiny
WEB_DTYPE ?= float32
WEB_SCALES ?= 1 2 3 4

.PHONY: help demo app space web test lint docs notebooks badges package clean \
	gpu has_cuda gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z_]+:.*## / {printf "%-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO) ## reconstruct two images and generate a sheet, into outputs/; a minute or two after the installation
	$(BIN)/hieratok reconstruct --output outputs --overwrite
	$(BIN)/hieratok generate --steps 25 --guidance_scale 8 --guidance_eta 0.5 \
		--guidance_interval 0.3 1 --output outputs/generated.png --overwrite

app: $(READY) ## serve a page to try it in a browser, on this machine alone
	$(BIN)/hieratok app

# A Space installs the package from itself, by its name.
space: $(READY) ## collect what a Hugging Face Space needs in build/space: make space SPACE=you/name
	rm -rf build/space
	mkdir -p build/space
	cp examples/app.py examples/README.md examples/requirements.txt build/space
	$(BIN)/python -m build --wheel --no-isolation --outdir build/space . >/dev/null
	cd build/space && for wheel in *.whl; do \
		echo "hieratok_hf @ https://huggingface.co/spaces/$(SPACE)/resolve/main/$$wheel" >> requirements.txt; done
	@echo "ready: $(BIN)/hf upload --repo-type space $(SPACE) build/space ."

# Programs of fewer scales are there for what a visitor sees first. The service worker goes by the checksum of all files.
web: $(READY) web/node_modules ## build a page that needs no server in build/web: make web WEB_DTYPE=int8
	rm -rf $(WEB)
	mkdir -p $(WEB)/ort $(WEB)/images
	cp web/*.html web/*.css web/*.js web/*.svg web/README.md $(WEB)
	cp src/hieratok_hf/example_images/*.webp $(WEB)/images
	cd web/node_modules/onnxruntime-web/dist && cp ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm \
		ort.webgpu.min.mjs ort-wasm-simd-threaded.asyncify.mjs ort-wasm-simd-threaded.asyncify.wasm $(abspath $(WEB))/ort
	$(BIN)/hieratok export $(WEB_MODEL) $(WEB)/model --format onnx --dtype $(WEB_DTYPE) --opset 23 --num_scales $(WEB_SCALES)
	sed "s/^const VERSION = .*/const VERSION = \"$$(find $(WEB) -type f | sort | xargs cat | cksum | tr ' ' -)\";/" web/sw.js > $(WEB)/sw.js
	@du -sh $(WEB)
	@echo "ready: python3 -m http.server --directory $(WEB), then http://localhost:8000"
	@echo "as a Space: $(BIN)/hf upload --repo-type space $(SPACE) $(WEB) ."

web/node_modules: web/package.json web/package-lock.json
	npm ci --prefix web --ignore-scripts --no-audit --no-fund
	touch web/node_modules

# A test keeps one core busy, so as many run at once as there are cores, up to four.
test: export OMP_NUM_THREADS := 1
test: $(READY) ## run all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(READY) ## check style, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY) ## build the pages and the reference into site/
	$(BIN)/mkdocs build --strict

# The notebooks once more, in place, without times and versions that would change with the run and the machine; `jupyter
# execute` cannot leave them out.
notebooks: export HF_HUB_OFFLINE := 1
notebooks: export OMP_NUM_THREADS := 1
notebooks: $(READY) ## run the notebooks again, in place
	for file in examples/notebooks/*.ipynb; do $(BIN)/python -c "import sys, nbclient, nbformat; \
		book = nbformat.read(sys.argv[1], as_version=4); \
		nbclient.execute(book, cwd='examples/notebooks', record_timing=False, coalesce_streams=True); \
		book.metadata.language_info = {'name': 'python'}; \
		nbformat.write(book, sys.argv[1])" $$file || exit 1; done

# A badge needs the address of a repository that is public; once more, it takes the place of the last one.
badges: $(READY) ## put a badge that opens it in Colab on each notebook: make badges GITHUB=owner/name
	@test -n "$(GITHUB)" || { echo "error: GITHUB=owner/name is needed" >&2; exit 2; }
	for file in examples/notebooks/*.ipynb; do $(BIN)/python -c "import sys, nbformat; \
		book = nbformat.read(sys.argv[1], as_version=4); \
		link = 'https://colab.research.google.com/github/$(GITHUB)/blob/main/' + sys.argv[1]; \
		text = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n\nIn Colab, run ' \
			'this first: \`!git clone https://github.com/$(GITHUB) here\`, \`%pip install \"./here[notebooks]\"\`, ' \
			'\`%cd here/examples/notebooks\`.'; \
		others = [cell for cell in book.cells if cell.id != 'badge']; \
		book.cells = [nbformat.v4.new_markdown_cell(text, id='badge'), *others]; \
		nbformat.write(book, sys.argv[1])" $$file || exit 1; done

# The environment of the demo has nothing but the wheel.
package: $(READY) ## build sdist and wheel into dist/, and run the demo from the wheel
	rm -rf dist build/package
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo dist/*.whl)[eval]"
	cd build/package && HF_HUB_OFFLINE=1 venv/bin/hieratok reconstruct --output outputs
	cd build/package && HF_HUB_OFFLINE=1 venv/bin/hieratok generate --steps 25 --guidance_scale 8 --guidance_eta 0.5 \
		--guidance_interval 0.3 1 --output outputs/generated.png

# What only a GPU can say: the tests on the device, and the times that `auto` follows. On a machine that has all the
# packages already: make gpu BIN=$$(dirname $$(which python3)) READY=
# Each part takes minutes and can be run alone, and again; what it measures is added to benchmarks/results/.
gpu: gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes ## test and measure on a CUDA device

gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes: export PYTHONPATH := src:$(PYTHONPATH)
has_cuda: $(READY)
	@$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'this needs a CUDA device'"

# Compiling takes most of the time of the kernels' tests, so several share the device.
gpu_tests: has_cuda
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m "not gpu" -n 8 tests/ops/test_attention_triton.py tests/ops/test_rotary_triton.py

gpu_attention: has_cuda
	$(BIN)/python benchmarks/bench_attention.py --json --record

gpu_model: has_cuda
	$(BIN)/python benchmarks/bench_decode.py --json
	$(BIN)/python benchmarks/bench_train.py --json
	$(BIN)/python benchmarks/bench_generation.py --json

# The rows of the targets first: what is compiled takes longest.
gpu_autoencoders: has_cuda
	$(BIN)/python benchmarks/bench_autoencoders.py --json --seconds 5 --compiled --sizes 256 --batches 16 \
		--models hieratok-tiny hieratok-s hieratok-b hieratok-l AutoencoderKL AutoencoderTiny
	$(BIN)/python benchmarks/bench_autoencoders.py --json --seconds 5 --compiled --sizes 256 --batches 64 \
		--models hieratok-b AutoencoderKL --directions decode
	$(BIN)/python benchmarks/bench_autoencoders.py --json --seconds 5 --eager

gpu_sizes: has_cuda
	$(BIN)/python benchmarks/bench_image_sizes.py --json

# The demo waits for the core and the extra eval alone; modules are compiled where they are imported. torch comes first and by
# its exact version, so that a machine with a build of its own keeps that build.
$(DEMO): pyproject.toml constraints.txt
	@echo "Installing PyTorch, the package and its extra eval into $(VENV), once, in 2 to 5 minutes:"
	@echo "1.2 GB with a PyTorch for CPUs, 6 GB with one for CUDA, which is what PyPI has for Linux."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-compile "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --no-compile -c constraints.txt -e ".[eval]"
	touch $(DEMO)

# A build of torch for GPUs brings the Triton that it needs; elsewhere the tests run its kernels in an interpreter.
$(READY): $(DEMO)
	$(INSTALL) -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) $(TRITON)
	touch $(READY)

clean: ## delete what the other targets made
	rm -rf $(VENV) outputs build dist site web/node_modules .pytest_cache .ruff_cache .mypy_cache
