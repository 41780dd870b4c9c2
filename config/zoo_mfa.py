"""zoo.py with multi-matrix factorization attention: heads of 64 that share one key and value head,
and queries through a latent of 96; 128 cached numbers.
"""
from config.zoo import *

n_kv_head = 1
head_dim = 64
q_latent = 96
mlp_hidden = 800
