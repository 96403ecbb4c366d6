#!/usr/bin/env bash
# Train a tokenizer on a GPU, for as many steps as there is time for: recipes/gpu.sh hieratok-tiny-16x 10000
# Started again after an interruption, it goes on. On a machine that has the packages: BIN=$(dirname $(which python3))
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-../shared/data} size=${1:-hieratok-tiny} steps=${2:-20000}
export PYTHONPATH=src:${PYTHONPATH:-}

"$bin/python" -m hieratok_hf train --data "$data"/imagenette_128/train-*.tar "$data"/clothing_256/train-*.tar \
    --output "runs/gpu/$size" --resume --size "$size" --steps "$steps" --decay_steps $((steps / 3)) --lr 2e-3 \
    --batch_size 64 --mixed_precision bf16 --crop_sizes 128 128 256 --crop_scale 0 0 --pixel_loss mse \
    --perceptual_weight 2e-4 --vision_model "$data"/mobilenet_v2_1.0_224 --ema 0.999 --save_every 1000 --num_workers 12
