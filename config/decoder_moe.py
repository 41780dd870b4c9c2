"""decoder_mla.py with experts, as in DeepSeek-V3: after the first layer, each token passes a shared
SwiGLU and 2 of 16 others. The three are together as wide as the SwiGLU of decoder_mla.py.

Asks: what are three times the weights worth at the same arithmetic per token, and does an output
latent (--o_latent=96) cost a model with experts anything? RESULTS.md has a short run. The published
decoders, MLA and MLA-o with --o_norm=sum (see decoder_mla.py), have fewer and smaller experts: 4 of
128 instead of 16 of 336.
"""
from config.decoder_mla import *

mlp = 'moe'
first_k_dense = 1
mlp_hidden = 1024  # of the first layer
n_routed_experts = 16
n_experts_per_tok = 2
n_shared_experts = 1
expert_hidden = 336  # 3 x 336 = 1,008
balance_rate = 0.01  # published: 0.001, for runs a hundred times longer
