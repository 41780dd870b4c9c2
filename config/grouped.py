"""Grouped latents: 48 bytes a group, compressed to 16 and then to 2 latents, 16 wide blocks over
those, and back to bytes.

Asks: is a deep trunk over a few latents worth more than a plain decoder of equal arithmetic? Here it
is not: see RESULTS.md. Sizes and recipe are ours, for five minutes of two cores: no loss is
published.
"""

# data: bytes, three ids more for the special tokens
dataset = 'wiki10k'
tokenizer = 'byte'
vocab_size = 259
block_size = 768

# model: the trunk does 44% of the arithmetic; rotary positions are token times on every level
arch = 'grouped_latent'
group_size = 48
latents = (16, 2)
widths = (64, 128, 256)
n_layer = 16
head_dim = 32
rope_dims = 32
norm = 'rms'
mlp = 'gelu'

# recipe: five minutes on a CPU, where many small steps learn the most; a GPU takes more sequences
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
