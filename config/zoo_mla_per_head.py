"""MLA, keys per head: zoo_mla.py without a shared key. Each head rotates 16 dimensions of its own,
and the latent is as wide as latent and shared key together in zoo_mla.py; 80 cached elements.
"""
from config.zoo_mla import *

kv_latent = 80
rope_key = 'per_head'
mlp_hidden = 880
