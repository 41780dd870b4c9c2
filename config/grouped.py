"""Grouped latents: each group of 48 bytes is compressed to 16 latents and then to 2; 16 wide blocks
run over those, and they become bytes again.

Asks: is a deep trunk over a few latents worth more than a plain decoder with the same arithmetic?
Here it is not: see RESULTS.md. Sizes and recipe are ours, chosen for five minutes on two cores. No
loss is published.
"""

# data: bytes, and three ids for the special tokens
dataset = 'wiki10k'
tokenizer = 'byte'
vocab_size = 259
block_size = 768

# model: the trunk does 44% of the arithmetic; rotary positions count tokens on every level
arch = 'grouped_latent'
group_size = 48
latents = (16, 2)
widths = (64, 128, 256)
n_layer = 16
head_dim = 32
rope_dims = 32
norm = 'rms'
mlp = 'gelu'

# recipe: five minutes on a CPU, where many small steps learn the most; use larger batches on a GPU
batch_size = 2
max_iters = 100_000  # the clock decides
max_seconds = 300.0
learning_rate = 6e-3
schedule = 'wsd'
warmup_iters = 50
weight_decay = 0.05
eval_interval = 250
eval_iters = 0  # all of the validation file
log_interval = 50
