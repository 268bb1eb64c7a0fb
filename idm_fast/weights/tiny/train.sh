#!/bin/sh
# Makes the weights in this folder again: IDM.tiny at ratio 10 %, about half an hour on two idle CPU cores.
# Usage: train.sh FOLDER_OF_TRAINING_IMAGES OUTPUT_FOLDER      (the images were BSDS500's 400 training and test photographs)
set -eu
exec idm-fast train --train_data_dir "$1" --output_dir "$2" --model tiny --schedule store \
    --cs_ratio 0.1 --resolution 96 --train_batch_size 2 --max_train_steps 3800 \
    --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 50 --max_grad_norm 1 --ema_decay 0.999 \
    --checkpointing_steps 500 --checkpoints_total_limit 3
