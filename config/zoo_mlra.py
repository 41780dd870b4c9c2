"""MLRA: zoo_mla.py with four latents of 16. Each head reads each of them by a separate attention.
80 cached elements. Scores cost four times as much as in zoo_mla.py.
"""
from config.zoo_mla import *

kv_latent = 16
kv_branches = 4
mlp_hidden = 901
