"""grouped.py whose trunk also predicts its own next input.

Claim: this helps a trunk that otherwise learns only from the distant bytes.
"""
from config.grouped import *

latent_loss = True
latent_loss_coeff = 0.1
