"""MQA: zoo.py with one key and value head (multi-query attention); 64 cached elements."""
from config.zoo import *

n_kv_head = 1
mlp_hidden = 917
