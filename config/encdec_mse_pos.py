"""encdec.py with an embedding loss (squared error, coefficient 8) and with positions subtracted.

The best published variant: validation loss 3.378 after 9,000 steps, against 3.424 for decoder.py.
After 0.6 million tokens it is worse than decoder.py and encdec.py: see RESULTS.md.
Parameters: 15,763,500 (without positions).
"""
from config.encdec_pos import *

embedding_loss = 'mse'
embedding_loss_coeff = 8.0
