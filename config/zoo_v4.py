"""V4: zoo.py with the attention of DeepSeek-V4, a window of 32 tokens, and entries of 4 tokens in
two layers and of 16 in one. 9 cached elements, plus at most 3,360 for the window and the open
groups, averaged over the layers.
"""
from config.zoo import *

attention = 'v4'
q_latent = 96
layer_kinds = 'window csa hca csa'
window = 32
hca_group = 16
head_dim = 64
sink = True
o_latent = 64
o_groups = 2
mlp_hidden = 852
