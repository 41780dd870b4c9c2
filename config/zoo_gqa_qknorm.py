"""GQA, QK-norm: zoo_gqa.py with an RMSNorm on the queries and keys of each head; 128 cached
elements.
"""
from config.zoo_gqa import *

qk_norm = True
