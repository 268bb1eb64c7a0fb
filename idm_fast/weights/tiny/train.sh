#!/bin/sh
# Makes the weights in this folder again: IDM.tiny at ratio 10 %; it took 190 core-minutes on a busy 2-core machine.
# Usage: train.sh FOLDER_OF_TRAINING_IMAGES OUTPUT_FOLDER      (the images were BSDS500's 400 training and test photographs)
set -eu
recipe="--train_data_dir $1 --model tiny --schedule store --cs_ratio 0.1 --learning_rate 1e-3 --lr_scheduler cosine
    --lr_warmup_steps 50 --max_grad_norm 1 --ema_decay 0.999 --checkpointing_steps 500 --checkpoints_total_limit 3
    --train_batch_size 2"
# First small crops, then larger ones, twice, each time from the weights of the run before.
# shellcheck disable=SC2086
idm-fast train $recipe --output_dir "$2/first" --resolution 96 --max_train_steps 3800
# shellcheck disable=SC2086
idm-fast train $recipe --output_dir "$2/second" --pretrained_model_name_or_path "$2/first" --resolution 128 --max_train_steps 1300
# shellcheck disable=SC2086
exec idm-fast train $recipe --output_dir "$2" --pretrained_model_name_or_path "$2/second" --resolution 128 --max_train_steps 5500
