"""GLA: zoo_mla.py with two latents of 32, each for half of the heads; 80 cached elements."""
from config.zoo_mla import *

kv_latent = 32
kv_groups = 2
mlp_hidden = 917
