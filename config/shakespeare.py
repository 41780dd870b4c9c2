"""A minute or two on two CPU cores: a small causal model of bytes, trained on your own text file.

Asks: how good can a model get in that time? The usual text is tinyshakespeare, on which nanoGPT's
recipe for CPUs, a model of this size, takes longer and loses more (results/speed.md):
python train.py config/shakespeare.py --source=input.txt
Sizes and recipe are ours.
"""

# data: bytes; the last tenth of the file is held out
dataset = 'text'
tokenizer = 'byte'
vocab_size = 257  # 256 bytes and <|endoftext|>
block_size = 128

# model
arch = 'transformer'
causal = True
n_layer = 4
n_head = 4
n_embd = 128
rope_dims = 32
rope_theta = 100.0
learned_positions = False
norm = 'rms'
qk_norm = True
mlp = 'relu2'
tie_embeddings = False

# recipe
batch_size = 16
max_iters = 400
optimizer = 'muon'
learning_rate = 1e-2
schedule = 'wsd'
warmup_iters = 20
weight_decay = 0.05
eval_interval = 50
eval_iters = 20
log_interval = 25
