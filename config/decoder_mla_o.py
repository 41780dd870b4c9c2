"""decoder_mla.py with MLA-o: the outputs of all heads pass a shared latent of 96, which has a norm.

Asks: does a decoder lose anything by it, and does it change what the heads write? See svd.py.
"""
from config.decoder_mla import *

o_latent = 96
o_norm = 'sum'
