"""decoder_mla.py with the attention of DeepSeek-V4: the last 128 tokens exactly and earlier ones as
entries of 4 or 32 tokens, one vector for key and value, a sink, and an output latent in groups. In
two of the six layers a query sees only its window.

Asks: what does it cost in loss if the cache, all layers together, grows by 36 elements per token
instead of the 480 of decoder_mla.py? There is no indexer, because 1,024 tokens make only 256
entries and DeepSeek-V4 reads 512. Parameters: as many as decoder_mla.py, within 0.1%. Nothing is
published at this size.
"""
from config.decoder_mla import *

attention = 'v4'
kv_latent = None
rope_key = 'per_head'
layer_kinds = 'window window csa hca csa hca'
window = 128
csa_group = 4
hca_group = 32  # DeepSeek-V4: 128, for contexts a thousand times longer
head_dim = 64
sink = True
o_latent = 64
o_groups = 4
mlp_hidden = 943
