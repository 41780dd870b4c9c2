"""grouped.py whose trunk also has to predict its own next input.

Claim: it helps a trunk that otherwise learns from far away.
"""
from config.grouped import *

latent_loss = True
latent_loss_coeff = 0.1
