"""MLA-o, 2 groups: zoo_mla.py with two output latents of 64, as in DeepSeek-V4, each for half of
the heads. They have as many weights as one of 96.
"""
from config.zoo_mla import *

o_latent = 64
o_groups = 2
mlp_hidden = 922
