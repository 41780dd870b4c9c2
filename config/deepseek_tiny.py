"""Decoder with DeepSeek-V3's attention and experts, as published under the name deepseek-tiny-v0.1.
All 32 dimensions of a head are rotated and none is left, so all heads share one key.

Asks: what does an output latent cost a decoder (deepseek_tiny_mla_o.py)? Published for
WikiText-103: perplexity 28.89 at length 1,024 after 12,500 steps of 1,024 sequences (MLA-o 29.33)
and 39.21 at length 128 (40.94); on SST-2, answered as text, 87.96% and 87.04% (MLA-o 86.24 and
85.78). For the second length: --block_size=128. Parameters: 17,053,120. Sizes, rate and weight
decay are the published ones; the schedule, the initial weights and the balance of experts are ours.
"""
from config.decoder_mla import *

rope_dims = 32

mlp = 'moe'
first_k_dense = 1  # the first layer is a swiglu
mlp_hidden = 1024
n_routed_experts = 4
n_experts_per_tok = 2
n_shared_experts = 1
expert_hidden = 128

batch_size = 1024
max_iters = 12_500
learning_rate = 5e-4
schedule = 'linear'
min_lr = 0.0
warmup_iters = None
weight_decay = 0.01
beta2 = 0.999
eval_interval = 500
