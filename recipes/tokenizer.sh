# Sourced by the recipes of both tokenizers: where the data lies, and what all of their stages have.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-../shared/data}
train=("$bin/python" -m hieratok_hf train --data "$data"/imagenette_128/train-*.tar "$data"/clothing_256/train-*.tar
    --resume --crop_scale 0 0 --pixel_loss mse)
averages='{"downsampling": "mean", "coarse_weight": 0.02}'
