"""MHA, gate: zoo.py with a gate on the outputs of the heads."""
from config.zoo import *

gate = True
mlp_hidden = 683
