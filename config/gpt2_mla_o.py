"""gpt2_mla.py with MLA-o: the outputs of all heads pass a shared latent, a third as wide as the
model, and the feed-forward takes the parameters that it saves.

Asks: is there a better use for a third of W^O at GPT-2's size? It has not been run here.
Parameters: 124,478,208, as many as gpt2_mla.py.
"""
from config.gpt2_mla import *

o_latent = 256
mlp_hidden = 3712
