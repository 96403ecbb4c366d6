#!/usr/bin/env bash
# Train the generator hieratok-dit-tiny on the latents of hieratok-tiny, once more after it had decayed; with a number of
# steps instead, train one on a GPU: recipes/hieratok-dit-tiny.sh 40000. Started again after an interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-../shared/data}
export PYTHONPATH=src:${PYTHONPATH:-}

"$bin/python" -m hieratok_hf cache --model hieratok-tiny --size 64 --kind mode --output runs/latents-64 \
    --data "$data/imagenette_128/train-*.tar"
train=("$bin/python" -m hieratok_hf train-dit --resume --vae hieratok-tiny --size dit-tiny --latents runs/latents-64 --lr 5e-4
    --warmup_steps 200 --mixed_precision bf16 --export_dtype float16 --class_names tench "English springer"
    "cassette player" "chain saw" church "French horn" "garbage truck" "gas pump" "golf ball" parachute)
if [[ $# -gt 0 ]]; then
    "${train[@]}" --output runs/gpu/hieratok-dit-tiny --steps "$1" --decay_steps $(($1 / 3)) --ema 0.9998 --batch_size 256
else
    # The second goes on where the rate has fallen, which makes it another training than one of 13500 steps.
    for steps in 9000 13500; do
        "${train[@]}" --allow_changes --output runs/hieratok-dit-tiny --steps $steps --decay_steps 3000 --ema 0.9995 --batch_size 64
    done
fi
