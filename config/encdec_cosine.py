"""encdec_mse.py with the cosine, which compares only directions, instead of the squared error.

Parameters: 15,763,500 (without positions).
"""
from config.encdec import *

embedding_loss = 'cosine'
embedding_loss_coeff = 1.0
