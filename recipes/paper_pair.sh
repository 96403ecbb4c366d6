#!/usr/bin/env bash
# Train the paper's comparison on the GPUs of a machine: hieratok-b and its twin of one scale, alike in all else, on
# ImageNet at 256x256, and a DiT on the latents of each; rFID and gFID over Inception. Started again after an
# interruption, it goes on.
#
#     DATA=imagenet recipes/paper_pair.sh            # imagenet/train-*.tar and imagenet/val-*.tar
#     DATA=imagenet recipes/paper_pair.sh --hours    # only how long it should take
#
# RATE is the images a second that `benchmarks/bench_train.py` prints on one of the GPUs, compiled 984 on an NVIDIA H200
# without the perceptual and adversarial losses, which take more. A training takes steps x batch / (RATE x GPUS) seconds,
# a DiT's by the ratio of both steps' arithmetic (306 and 139 GFLOP an image), as if it used the chip as well. It needs
# the packages lpips and torch-fidelity. Neither the settings nor the hours were tried at this size.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-imagenet} output=${OUTPUT:-runs/paper_pair}
rate=${RATE:-984} gpus=${GPUS:-8}
steps=${STEPS:-250000} batch=${BATCH:-256} dit_steps=${DIT_STEPS:-400000} dit_batch=${DIT_BATCH:-256}
# All that a smaller comparison changes.
read -ra size <<<"${SIZE:---size hieratok-b --crop_sizes 256}"
read -ra losses <<<"${LOSSES:---pixel_loss mse --lpips_weight 1 --adversarial_weight 0.5 --adversarial_start $((steps / 2))}"
read -ra dit_size <<<"${DIT_SIZE:---size dit-b}"
read -ra fid <<<"${FID:-}"
read -ra launch <<<"${LAUNCH:-$bin/accelerate launch --multi_gpu --num_processes $gpus --mixed_precision bf16 -m hieratok_hf}"
samples=${SAMPLES:-50000} workers=${WORKERS:-8}
read -ra compile <<<"${COMPILE:---compile}"

awk -v images=$((steps * batch)) -v dit_images=$((dit_steps * dit_batch)) -v rate="$rate" -v gpus="$gpus" 'BEGIN {
    tokenizer = images / rate / gpus / 3600
    dit = dit_images / (rate * 306 / 139) / gpus / 3600
    printf "2 tokenizers of %.1f hours and 2 DiTs of %.1f: %.1f hours\n", tokenizer, dit, 2 * (tokenizer + dit)
}'
if [[ ${1:-} == --hours ]]; then exit; fi

for scales in "8 4 2 1" 1; do
    read -ra factors <<<"$scales"
    folder=$output/scales-${#factors[@]}
    "${launch[@]}" train "${size[@]}" --scale_factors "${factors[@]}" --data "$data"/train-*.tar \
        --output "$folder/tokenizer" --resume --steps "$steps" --batch_size "$batch" --lr 1e-4 --ema 0.999 \
        --warmup_steps $((steps / 20)) --decay_steps "$steps" --num_workers "$workers" "${losses[@]}" "${compile[@]}"
    "$bin/python" -m hieratok_hf evaluate --model "$folder/tokenizer" --data "$data"/val-*.tar \
        --json "$folder/rfid.json" --overwrite "${fid[@]}"
    "$bin/python" -m hieratok_hf cache --model "$folder/tokenizer" --data "$data"/train-*.tar --output "$folder/latents"
    "${launch[@]}" train-dit "${dit_size[@]}" --latents "$folder/latents" --vae "$folder/tokenizer" \
        --output "$folder/dit" --resume --steps "$dit_steps" --batch_size "$dit_batch" --lr 2e-4 --ema 0.9999 \
        "${compile[@]}"
    "$bin/python" -m hieratok_hf evaluate-generation --model "$folder/dit" --samples "$samples" --guidance_scale 1 \
        --reference "$data"/val-*.tar --json "$folder/gfid.json" --overwrite "${fid[@]}"
done
