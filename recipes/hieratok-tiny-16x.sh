#!/usr/bin/env bash
# Train the weights of hieratok-tiny-16x as those of hieratok-tiny, but for the encoder, which is trained on.
# Started again after an interruption, it goes on.
source "$(dirname "$0")/tokenizer.sh"

"${train[@]}" --output runs/hieratok-tiny-16x-1 --size hieratok-tiny-16x --config "$averages" \
    --steps 14000 --decay_steps 5000 --lr 1.5e-3 --batch_size 8 --crop_sizes 128 128 128 256 --ema 0.998
"${train[@]}" --output runs/hieratok-tiny-16x-2 --model runs/hieratok-tiny-16x-1 --downsampling learned \
    --steps 2000 --decay_steps 1900 --lr 7e-4 --batch_size 8 --crop_sizes 128 128 128 256 --coarse_weight 0.1 \
    --border_weight 0.02 --latent_jitter 0.2 --linear_lr_factor 0.3 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-16x-3 --model runs/hieratok-tiny-16x-2 \
    --steps 1500 --decay_steps 1450 --lr 7e-4 --batch_size 8 --crop_sizes 128 128 128 256 --coarse_weight 0.5 \
    --border_weight 0.01 --latent_jitter 0.1 --linear_lr_factor 0.5 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-16x-4 --model runs/hieratok-tiny-16x-3 \
    --steps 1000 --decay_steps 990 --warmup_steps 10 --lr 4e-4 --batch_size 8 --crop_sizes 128 128 128 256 \
    --coarse_weight 0.3 --border_weight 0.015 --latent_jitter 0.08 --linear_lr_factor 0.3 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-16x-5 --model runs/hieratok-tiny-16x-4 \
    --steps 1200 --decay_steps 600 --warmup_steps 50 --lr 2e-3 --batch_size 128 --crop_sizes 128 128 128 256 \
    --coarse_weight 0.3 --border_weight 0.03 --latent_jitter 0.25 --linear_lr_factor 0.3 --ema 0.998
"${train[@]}" --output runs/hieratok-tiny-16x-6 --model runs/hieratok-tiny-16x-5 \
    --steps 6000 --decay_steps 5000 --warmup_steps 50 --lr 1e-3 --batch_size 16 --crop_sizes 128 128 128 256 \
    --coarse_weight 0.35 --border_weight 0.025 --latent_jitter 0.12 --linear_lr_factor 0.3 --ema 0.998
"${train[@]}" --output runs/hieratok-tiny-16x-7 --model runs/hieratok-tiny-16x-6 --freeze_encoder \
    --steps 1200 --decay_steps 1170 --warmup_steps 30 --lr 5e-4 --batch_size 16 --crop_sizes 128 128 128 256 \
    --coarse_weight 0.35 --border_weight 0.07 --latent_jitter 0.12 --linear_lr_factor 0.3 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-16x --model runs/hieratok-tiny-16x-7 --freeze_encoder \
    --steps 1500 --decay_steps 1480 --warmup_steps 20 --lr 4e-4 --batch_size 16 --crop_sizes 128 128 256 \
    --coarse_weight 0.7 --border_weight 0.07 --latent_jitter 0.12 --linear_lr_factor 0.3 --ema 0.99 \
    --perceptual_weight 2e-4 --vision_model "$data"/mobilenet_v2_1.0_224
"$bin/python" -m hieratok_hf fit-quantizer runs/hieratok-tiny-16x --data "$data"/imagenette_128/train-*.tar --overwrite
