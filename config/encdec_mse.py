"""encdec.py with an embedding loss: the mean of the embeddings so far is pulled to the encoder's
output, by their squared error.

Asks: is an encoder better that summarises what it has read? Watch embedding_gain and encoder_gain:
the loss can fall by shrinking them, and --embedding_loss_affine=False takes them away. Parameters:
15,763,500 (positions not counted).
"""
from config.encdec import *

embedding_loss = 'mse'
embedding_loss_coeff = 1.0
