"""gpt2.py with DeepSeek-V3's attention, rotary positions and RMSNorm. Its cache is a tenth of the
other's, and a wider feed-forward takes the parameters that latents and positions save.

Asks: does MLA beat MHA at GPT-2's size, on its data, with its recipe? It has not been run
here. Parameters: 124,478,208, within 0.1% of gpt2.py.

As in DeepSeek-V3, a head has half as many rotated dimensions as others, and q_latent is three times
kv_latent. That is 512 there: as a share of the width it would be 55 here, and as a number of heads
(four) 256, with a q_latent as wide as the model. 128 is in between.
"""
from config.gpt2 import *

attention = 'mla'
head_dim = 96  # of which 32 rotated
v_head_dim = 64
q_latent = 384
kv_latent = 128
rope_key = 'shared'
rope_dims = 32
learned_positions = False
norm = 'rms'
mlp_hidden = 3584
