"""encdec_mse.py with the cosine, which sees only directions, in place of the squared error.

Parameters: 15,763,500 (positions not counted).
"""
from config.encdec import *

embedding_loss = 'cosine'
embedding_loss_coeff = 1.0
