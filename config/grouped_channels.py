"""grouped.py with two channels in every second trunk block and half as many latents. Compared with
grouped.py, the scores of the trunk's attention cost half and its projections about three quarters.

Claim: s channels over K/m latents do better than one over K. Compare with grouped.py.
"""
from config.grouped import *

latents = (16, 1)
n_channels = 2
channels_every = 2
