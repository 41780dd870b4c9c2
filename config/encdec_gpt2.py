"""encdec_mse_pos.py with the width, heads, depth and length of GPT-2 small: 768 wide, heads of 64,
twelve blocks, 1,024 tokens. Cross-attention makes it larger: 138.3M parameters against 124M.

Asks: what does it do at a size that people use? Nothing is published for this size. It keeps the
9,000 steps of decoder.py and its cosine over 700,000. Meant for 8 GPUs:
torchrun --nproc_per_node=8 train.py config/encdec_gpt2.py
"""
from config.encdec_mse_pos import *

block_size = 1024
n_layer = 6  # and as many in the decoder
n_embd = 768
n_head = 12
cross_n_head = 12
batch_size = 480
micro_batch_size = 12
learning_rate = 6e-4
min_lr = 6e-5
