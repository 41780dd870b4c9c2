"""GQA: zoo.py with grouped queries, two key and value heads; 128 cached elements."""
from config.zoo import *

n_kv_head = 2
mlp_hidden = 896
