"""decoder_mla.py with experts, as in DeepSeek-V3: after the first layer a token meets a shared
SwiGLU and 2 of 16 others, together as wide as the one of decoder_mla.py.

Asks: what are three times the weights worth at the same arithmetic a token, and does an output
latent (--o_latent=96) cost a model with experts anything? RESULTS.md has a short run. Nothing is
published at this size; the published experiment was of a whole DeepSeek-V3, with --o_norm=sum.
"""
from config.decoder_mla import *

mlp = 'moe'
first_k_dense = 1
mlp_hidden = 1024  # of the first layer
n_routed_experts = 16
n_experts_per_tok = 2
n_shared_experts = 1
expert_hidden = 336  # 3 x 336 = 1,008
balance_rate = 0.01  # published: 0.001, for runs a hundred times as long
