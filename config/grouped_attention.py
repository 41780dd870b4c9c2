"""grouped.py that turns latents back into bytes by attention instead of repeating the last ones.

Claim: repetition does as well and costs less.
"""
from config.grouped import *

upsample = 'attention'
