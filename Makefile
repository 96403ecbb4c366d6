PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := triton==3.7.1

DATA ?= ../shared/data
SHARDS := $(wildcard $(DATA)/imagenette_128/train-*.tar) $(wildcard $(DATA)/clothing_256/train-*.tar)

SPACE ?= user/hieratok

.PHONY: demo app space test lint docs notebooks package train train_dit compare clean \
	gpu has_cuda gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes \
	train_16x train_gpu latents train_dit_gpu

demo: $(READY)
	$(BIN)/python examples/reconstruct.py --output outputs
	$(BIN)/python examples/generate.py --steps 25 --output outputs/generated.png

# The page of examples/app.py, on this machine alone.
app: $(READY)
	$(BIN)/python examples/app.py

# All that a Hugging Face Space needs. It installs the package from itself, by its name: make space SPACE=you/name
space: $(READY)
	rm -rf build/space
	mkdir -p build/space
	cp -r examples/app.py examples/generate.py examples/reconstruct.py examples/README.md examples/requirements.txt \
		examples/images build/space
	$(BIN)/python -m build --wheel --no-isolation --outdir build/space . >/dev/null
	cd build/space && for wheel in *.whl; do \
		echo "hieratok_hf @ https://huggingface.co/spaces/$(SPACE)/resolve/main/$$wheel" >> requirements.txt; done
	@echo "ready: $(BIN)/hf upload --repo-type space $(SPACE) build/space ."

# A test keeps one core busy, so as many run at once as there are cores, up to four.
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The pages of docs/, with a reference made of the docstrings, into site/.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The notebooks once more, in place, without times and versions that would change with the run and the machine; `jupyter
# execute` cannot leave them out.
notebooks: export HF_HUB_OFFLINE := 1
notebooks: export OMP_NUM_THREADS := 1
notebooks: $(READY)
	for file in examples/notebooks/*.ipynb; do $(BIN)/python -c "import sys, nbclient, nbformat; \
		book = nbformat.read(sys.argv[1], as_version=4); \
		nbclient.execute(book, cwd='examples/notebooks', record_timing=False, coalesce_streams=True); \
		book.metadata.language_info = {'name': 'python'}; \
		nbformat.write(book, sys.argv[1])" $$file || exit 1; done

# sdist and wheel into dist/; then what `make demo` does, offline, from the wheel in an environment that has nothing else.
package: $(READY)
	rm -rf dist build/package
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo dist/*.whl)[eval]"
	tar -xzf dist/*.tar.gz -C build/package --strip-components 1 --wildcards '*/examples'
	cd build/package && HF_HUB_OFFLINE=1 venv/bin/python examples/reconstruct.py --output outputs
	cd build/package && HF_HUB_OFFLINE=1 venv/bin/python examples/generate.py --steps 25 --output outputs/generated.png

# What only a GPU can say: the tests on the device, and the times that `auto` follows. On a machine that has all the
# packages already: make gpu BIN=$$(dirname $$(which python3)) READY=
# Each part takes minutes and can be run alone, and again; what it measures is added to benchmarks/results/.
gpu: gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes

gpu_tests gpu_attention gpu_model gpu_autoencoders gpu_sizes train_gpu latents train_dit_gpu: \
	export PYTHONPATH := src:$(PYTHONPATH)
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

# What makes the weights of hieratok-tiny: two stages with averages for coarse tokens, without and with a perceptual loss;
# then the decoder alone, with learned ones and noise on the latents. Started again after an interruption, it goes on.
TRAIN = $(BIN)/python examples/train_tokenizer.py --data $(SHARDS) --resume --crop_scale 0 0 --pixel_loss mse
AVERAGES := '{"downsampling": "mean", "coarse_weight": 0.02}'
train: $(READY)
	$(TRAIN) --output runs/hieratok-tiny-1 --config $(AVERAGES) --steps 5500 --decay_steps 2000 --lr 1.5e-3 \
		--batch_size 16 --crop_sizes 64 64 64 128 256 --linear_steps 600 --ema 0.995 --save_every 250
	$(TRAIN) --output runs/hieratok-tiny-2 --model runs/hieratok-tiny-1 --steps 4000 --decay_steps 3000 --lr 1e-3 \
		--batch_size 16 --crop_sizes 64 64 64 128 128 256 --perceptual_weight 2e-4 \
		--vision_model $(DATA)/mobilenet_v2_1.0_224 --ema 0.995 --save_every 250
	$(TRAIN) --output runs/hieratok-tiny-3 --model runs/hieratok-tiny-2 --downsampling learned --freeze_encoder \
		--steps 6000 --decay_steps 3000 --lr 1e-3 --batch_size 16 --crop_sizes 64 64 64 128 256 --coarse_weight 0.3 \
		--border_weight 0.02 --latent_jitter 0.3 --linear_lr_factor 0.3 --ema 0.997
	$(TRAIN) --output runs/hieratok-tiny-4 --model runs/hieratok-tiny-3 --freeze_encoder \
		--steps 2400 --decay_steps 2300 --lr 7e-4 --batch_size 16 --crop_sizes 64 64 128 128 256 --coarse_weight 0.3 \
		--border_weight 0.02 --latent_jitter 0.3 --linear_lr_factor 0.3 --ema 0.997
	$(TRAIN) --output runs/hieratok-tiny --model runs/hieratok-tiny-4 --freeze_encoder \
		--steps 1600 --decay_steps 1550 --lr 6e-4 --batch_size 16 --crop_sizes 64 64 128 128 256 --coarse_weight 1 \
		--border_weight 0.01 --latent_jitter 0.12 --linear_lr_factor 0.5 --ema 0.997

# What makes hieratok-tiny-16x; as above, but for the encoder, which is trained on.
train_16x: $(READY)
	$(TRAIN) --output runs/hieratok-tiny-16x-1 --size hieratok-tiny-16x --config $(AVERAGES) \
		--steps 14000 --decay_steps 5000 --lr 1.5e-3 --batch_size 8 --crop_sizes 128 128 128 256 --ema 0.998
	$(TRAIN) --output runs/hieratok-tiny-16x-2 --model runs/hieratok-tiny-16x-1 --downsampling learned \
		--steps 2000 --decay_steps 1900 --lr 7e-4 --batch_size 8 --crop_sizes 128 128 128 256 --coarse_weight 0.1 \
		--border_weight 0.02 --latent_jitter 0.2 --linear_lr_factor 0.3 --ema 0.997
	$(TRAIN) --output runs/hieratok-tiny-16x-3 --model runs/hieratok-tiny-16x-2 \
		--steps 1500 --decay_steps 1450 --lr 7e-4 --batch_size 8 --crop_sizes 128 128 128 256 --coarse_weight 0.5 \
		--border_weight 0.01 --latent_jitter 0.1 --linear_lr_factor 0.5 --ema 0.997
	$(TRAIN) --output runs/hieratok-tiny-16x-4 --model runs/hieratok-tiny-16x-3 \
		--steps 1000 --decay_steps 990 --warmup_steps 10 --lr 4e-4 --batch_size 8 --crop_sizes 128 128 128 256 \
		--coarse_weight 0.3 --border_weight 0.015 --latent_jitter 0.08 --linear_lr_factor 0.3 --ema 0.997
	$(TRAIN) --output runs/hieratok-tiny-16x-5 --model runs/hieratok-tiny-16x-4 \
		--steps 1200 --decay_steps 600 --warmup_steps 50 --lr 2e-3 --batch_size 128 --crop_sizes 128 128 128 256 \
		--coarse_weight 0.3 --border_weight 0.03 --latent_jitter 0.25 --linear_lr_factor 0.3 --ema 0.998
	$(TRAIN) --output runs/hieratok-tiny-16x-6 --model runs/hieratok-tiny-16x-5 \
		--steps 6000 --decay_steps 5000 --warmup_steps 50 --lr 1e-3 --batch_size 16 --crop_sizes 128 128 128 256 \
		--coarse_weight 0.35 --border_weight 0.025 --latent_jitter 0.12 --linear_lr_factor 0.3 --ema 0.998
	$(TRAIN) --output runs/hieratok-tiny-16x --model runs/hieratok-tiny-16x-6 --freeze_encoder \
		--steps 1200 --decay_steps 1170 --warmup_steps 30 --lr 5e-4 --batch_size 16 --crop_sizes 128 128 128 256 \
		--coarse_weight 0.35 --border_weight 0.07 --latent_jitter 0.12 --linear_lr_factor 0.3 --ema 0.997

# Both on a GPU, for as many steps as there is time for: make train_gpu SIZE=hieratok-tiny-16x STEPS=10000
SIZE ?= hieratok-tiny
STEPS ?= 20000
train_gpu: has_cuda
	$(BIN)/python examples/train_tokenizer.py --data $(SHARDS) --output runs/gpu/$(SIZE) --resume --size $(SIZE) \
		--steps $(STEPS) --decay_steps $$(( $(STEPS) / 3 )) --lr 2e-3 --batch_size 64 --mixed_precision bf16 \
		--crop_sizes 128 128 256 --crop_scale 0 0 --pixel_loss mse --perceptual_weight 2e-4 \
		--vision_model $(DATA)/mobilenet_v2_1.0_224 --ema 0.999 --save_every 1000 --num_workers 12

# What the generator is trained on; a run that was killed goes on, and a whole one ends at once.
latents: $(READY)
	$(BIN)/python examples/cache_latents.py --model hieratok-tiny --size 64 --kind mode --output runs/latents-64 \
		--data "$(DATA)/imagenette_128/train-*.tar"

DIT := examples/train_dit.py --resume --vae hieratok-tiny --size dit-tiny --latents runs/latents-64 --lr 5e-4 \
	--warmup_steps 200 --mixed_precision bf16 --export_dtype float16 --class_names tench "English springer" \
	"cassette player" "chain saw" church "French horn" "garbage truck" "gas pump" "golf ball" parachute

# What makes the generator hieratok-dit-tiny on the latents of hieratok-tiny, trained once more after it had decayed;
# started again, it goes on.
train_dit: latents
	$(BIN)/python $(DIT) --output runs/hieratok-dit-tiny --steps 9000 --decay_steps 3000 --ema 0.9995 --batch_size 64
	$(BIN)/python $(DIT) --output runs/hieratok-dit-tiny --steps 13500 --decay_steps 3000 --ema 0.9995 --batch_size 64

# The same on a GPU: make train_dit_gpu STEPS=40000
train_dit_gpu: has_cuda latents
	$(BIN)/python $(DIT) --output runs/gpu/hieratok-dit-tiny --steps $(STEPS) --decay_steps $$(( $(STEPS) / 3 )) \
		--ema 0.9998 --batch_size 256

# The comparisons of scales in benchmarks/README.md; hours on a CPU. Finished rows are kept.
compare: $(READY)
	$(BIN)/python benchmarks/compare_scales.py --data $(DATA)
	$(BIN)/python benchmarks/compare_scales.py --data $(DATA) --only_collect
	$(BIN)/python benchmarks/compare_generation.py --data $(DATA)
	$(BIN)/python benchmarks/compare_generation.py --data $(DATA) --only_collect

# A build of torch for GPUs brings the Triton that it needs; elsewhere the tests run its kernels in an interpreter.
# torch comes first and by its exact version, so that a machine with a build of its own keeps that build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON)
	touch $(READY)

clean:
	rm -rf $(VENV) outputs build dist site .pytest_cache .ruff_cache .mypy_cache
