"""MHA, QK-norm: zoo.py with an RMSNorm on the queries and keys of each head."""
from config.zoo import *

qk_norm = True
