"""Decoder: GPT-2 small as nanoGPT trains it on OpenWebText, the baseline of gpt2_mla.py.

Asks: what is the loss of MHA at a size and on data that people know? nanoGPT publishes a
validation loss of about 2.85 nats for this model and recipe, after four days on 8 A100s; it has not
been run here. Architecture, initial weights, optimizer and schedule are nanoGPT's; the order of the
data is ours, and so is the choice of the documents held out. Parameters: 124,373,760.

torchrun --nproc_per_node=8 train.py config/gpt2.py, with --dataset=fineweb-edu for other data
"""

# data
dataset = 'openwebtext'
tokenizer = 'gpt2'
vocab_size = 50304  # the tokenizer needs 50257; a multiple of 64 makes products faster on a GPU
block_size = 1024

# model: GPT-2's block, without biases
arch = 'transformer'
causal = True
attention = 'mha'
n_layer = 12
n_embd = 768
n_head = 12
learned_positions = True
norm = 'layer'
mlp = 'gelu'
mlp_hidden = 3072
dropout = 0.0
init_std = 0.02  # and 0.02/sqrt(24) for the 24 projections into the residual stream

# recipe: 491,520 tokens per step, 295 billion in all
batch_size = 480
micro_batch_size = 12
max_iters = 600_000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2_000
schedule = 'cosine'
weight_decay = 0.1
beta1, beta2 = 0.9, 0.95
grad_clip = 1.0
eval_interval = 1_000
eval_iters = 5  # 2,400 sequences, as many as nanoGPT's 200 batches of 12
log_interval = 10
