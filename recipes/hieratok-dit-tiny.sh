#!/usr/bin/env bash
# Train the generator hieratok-dit-tiny on the latents of hieratok-tiny-16x, aligned with MobileNetV2's features; with a
# number of steps instead, train one on a GPU: recipes/hieratok-dit-tiny.sh 40000. Started again after an interruption, it
# goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-../shared/data}
export PYTHONPATH=src:${PYTHONPATH:-}

"$bin/python" -m hieratok_hf cache --model hieratok-tiny-16x --size 128 --kind mode --output runs/latents-128 \
    --data "$data/imagenette_128/train-*.tar" --vision_model "$data/mobilenet_v2_1.0_224" --vision_layers 11 15
train=("$bin/python" -m hieratok_hf train-dit --resume --vae hieratok-tiny-16x --latents runs/latents-128
    --size dit-tiny --config '{"num_layers": 6, "attention_head_dim": 62}' --alignment_weight 0.5 --alignment_block 3
    --lr 6e-4 --warmup_steps 300 --mixed_precision bf16 --export_dtype float16 --compile --class_names tench
    "English springer" "cassette player" "chain saw" church "French horn" "garbage truck" "gas pump" "golf ball" parachute)
if [[ $# -gt 0 ]]; then
    "${train[@]}" --output runs/gpu/hieratok-dit-tiny --steps "$1" --decay_steps $(($1 / 3)) --ema 0.9998 --batch_size 256
else
    "${train[@]}" --output runs/hieratok-dit-tiny --steps 10000 --ema 0.9995 --batch_size 128
fi
