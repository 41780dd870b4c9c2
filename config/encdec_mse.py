"""encdec.py with an embedding loss: the squared error between the mean of the embeddings so far and
the encoder's output.

Asks: is an encoder better if it summarises what it has read? Watch embedding_gain and encoder_gain:
the loss can fall just because they shrink, and --embedding_loss_affine=False removes them.
Parameters: 15,763,500 (without positions).
"""
from config.encdec import *

embedding_loss = 'mse'
embedding_loss_coeff = 1.0
