"""grouped.py whose trunk also predicts its own next input.

Claim: this helps a trunk that otherwise learns only from the bytes, which are far away.
"""
from config.grouped import *

latent_loss = True
latent_loss_coeff = 0.1
