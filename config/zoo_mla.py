"""MLA: zoo.py with MLA as in DeepSeek-V3, a latent of 64 and one shared rotated key of 16; 80
cached elements.
"""
from config.zoo import *

attention = 'mla'
q_latent = 96
kv_latent = 64
rope_key = 'shared'
mlp_hidden = 901
