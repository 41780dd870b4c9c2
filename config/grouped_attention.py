"""grouped.py whose slots read the latents by attention, instead of taking the last ones as they
are.

Claim: repeating does as well, for less.
"""
from config.grouped import *

upsample = 'attention'
