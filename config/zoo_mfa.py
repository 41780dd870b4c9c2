"""MFA: zoo.py with multi-matrix factorization attention, heads of 64 that share one key and value
head, and a query latent of 96; 128 cached elements.
"""
from config.zoo import *

n_kv_head = 1
head_dim = 64
q_latent = 96
mlp_hidden = 800
