"""Decoder: the baseline of the encoder-decoder experiments, 26 layers, 160 wide, on Wikipedia.

Published validation loss after 9,000 steps: 3.424 nats with 16,036,800 parameters (without
positions), against 3.378 for an encoder-decoder of 15.76M. Two things differ from those runs: the
Wikipedia dump (20231101), and the evaluation, on 10,400 fixed sequences instead of 200 random
batches of 50.
"""

# data: GPT-2's vocabulary; a causal model needs no mask token and no padding token
dataset = 'wikipedia'
tokenizer = 'gpt2'
vocab_size = 50257
block_size = 200

# model: GPT-2's block, without biases
arch = 'transformer'
causal = True
n_layer = 26
n_embd = 160
n_head = 10
norm = 'layer'
mlp = 'gelu'
learned_positions = True

# recipe: the cosine of a run of 700,000 steps, stopped so early that the rate is nearly constant
# after the warmup
batch_size = 800
max_iters = 9_000
lr_decay_iters = 700_000
learning_rate = 9e-4
min_lr = 9e-5
warmup_iters = 300
schedule = 'cosine'
weight_decay = 0.1
beta1, beta2 = 0.9, 0.95
grad_clip = 0.0  # the published runs did not clip
eval_interval = 500
eval_iters = 13  # 10,400 sequences; published: 200 batches of 50
log_interval = 10
