#!/bin/sh
# Makes the weights in this folder again: IDM.tiny at ratio 10 %; it took 215 core-minutes on a busy 2-core machine.
# Usage: train.sh FOLDER_OF_TRAINING_IMAGES OUTPUT_FOLDER      (the images were BSDS500's 400 training and test photographs)
set -eu
recipe="--train_data_dir $1 --model tiny --schedule store --cs_ratio 0.1 --lr_scheduler cosine --max_grad_norm 1
    --checkpointing_steps 500 --checkpoints_total_limit 3
    --train_batch_size 2"
start="--learning_rate 1e-3 --lr_warmup_steps 50 --ema_decay 0.999"
end="--learning_rate 5e-4 --lr_warmup_steps 20 --ema_decay 0.995"
# First small crops, then three times larger ones, each time from the weights of the run before.
# shellcheck disable=SC2086
idm-fast train $recipe $start --output_dir "$2/first" --resolution 96 --max_train_steps 3800
# shellcheck disable=SC2086
idm-fast train $recipe $start --output_dir "$2/second" --resolution 128 --max_train_steps 1300 \
    --pretrained_model_name_or_path "$2/first"
# shellcheck disable=SC2086
idm-fast train $recipe $start --output_dir "$2/third" --resolution 128 --max_train_steps 5500 \
    --pretrained_model_name_or_path "$2/second"
# shellcheck disable=SC2086
exec idm-fast train $recipe $end --output_dir "$2" --resolution 128 --max_train_steps 1500 \
    --pretrained_model_name_or_path "$2/third"
