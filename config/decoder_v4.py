"""decoder_mla.py with the attention of DeepSeek-V4: 128 tokens exactly, what lies before in entries
of 4 or of 32 tokens, one vector for key and value, a sink, and an output latent in groups. Of two
layers in six a query sees its window alone.

Asks: what does the loss pay for a cache that grows with 36 numbers a token, all layers together,
where that of decoder_mla.py grows with 480? There is no indexer: at 1,024 tokens there are 256
entries, and DeepSeek-V4 takes 512. Parameters: as many as decoder_mla.py, within 0.1%. Nothing is
published at this size.
"""
from config.decoder_mla import *

attention = 'v4'
kv_latent = None
rope_key = 'per_head'
layer_kinds = 'window window csa hca csa hca'
window = 128
csa_group = 4
hca_group = 32  # DeepSeek-V4: 128, for contexts that are a thousand times as long
head_dim = 64
sink = True
o_latent = 64
o_groups = 4
mlp_hidden = 943
