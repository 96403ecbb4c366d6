#!/usr/bin/env bash
# Train the weights of hieratok-tiny: two stages with averages for coarse tokens, without and with a perceptual loss;
# then the decoder alone, with learned ones and noise on the latents, at last against a discriminator. Started again
# after an interruption, it goes on.
source "$(dirname "$0")/tokenizer.sh"

"${train[@]}" --output runs/hieratok-tiny-1 --config "$averages" --steps 5500 --decay_steps 2000 --lr 1.5e-3 \
    --batch_size 16 --crop_sizes 64 64 64 128 256 --linear_steps 600 --ema 0.995 --save_every 250
"${train[@]}" --output runs/hieratok-tiny-2 --model runs/hieratok-tiny-1 --steps 4000 --decay_steps 3000 --lr 1e-3 \
    --batch_size 16 --crop_sizes 64 64 64 128 128 256 --perceptual_weight 2e-4 \
    --vision_model "$data"/mobilenet_v2_1.0_224 --ema 0.995 --save_every 250
"${train[@]}" --output runs/hieratok-tiny-3 --model runs/hieratok-tiny-2 --downsampling learned --freeze_encoder \
    --steps 6000 --decay_steps 3000 --lr 1e-3 --batch_size 16 --crop_sizes 64 64 64 128 256 --coarse_weight 0.3 \
    --border_weight 0.02 --latent_jitter 0.3 --linear_lr_factor 0.3 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-4 --model runs/hieratok-tiny-3 --freeze_encoder \
    --steps 2400 --decay_steps 2300 --lr 7e-4 --batch_size 16 --crop_sizes 64 64 128 128 256 --coarse_weight 0.3 \
    --border_weight 0.02 --latent_jitter 0.3 --linear_lr_factor 0.3 --ema 0.997
"${train[@]}" --output runs/hieratok-tiny-5 --model runs/hieratok-tiny-4 --freeze_encoder \
    --steps 1600 --decay_steps 1550 --lr 6e-4 --batch_size 16 --crop_sizes 64 64 128 128 256 --coarse_weight 1 \
    --border_weight 0.01 --latent_jitter 0.12 --linear_lr_factor 0.5 --ema 0.997
train+=(--freeze_encoder --coarse_weight 1 --border_weight 0.01 --latent_jitter 0.12 --linear_lr_factor 0.5
    --perceptual_weight 2e-4 --vision_model "$data"/mobilenet_v2_1.0_224)
"${train[@]}" --output runs/hieratok-tiny-6 --model runs/hieratok-tiny-5 --steps 250 --decay_steps 240 \
    --warmup_steps 10 --lr 3e-4 --batch_size 16 --crop_sizes 64 128 256 --ema 0.98
# What ships is the state after 100 of these steps.
"${train[@]}" --output runs/hieratok-tiny --model runs/hieratok-tiny-6 --steps 200 --decay_steps 150 \
    --warmup_steps 10 --lr 1e-4 --batch_size 16 --crop_sizes 128 --ema 0.98 --adversarial_weight 0.05
"$bin/python" -m hieratok_hf fit-quantizer runs/hieratok-tiny --data "$data"/imagenette_128/train-*.tar --overwrite
