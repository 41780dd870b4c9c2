"""Encoder with plain multi-head attention: the baseline of mla.py and mla_o.py, which change only
the attention.

Asks: what does an encoder of 14.1M parameters lose on SST-2 when its attention goes through
latents? Published accuracy after fine-tuning on SST-2: 85.67% (MLA 84.75%, MLA-o 84.63%), after
masked-language modelling on WikiText-103 for 50,000 steps of 256 sequences. Parameters: 14,121,984.
Sizes and recipe are the published ones, except for the data (our own BPE, packed sequences) and the
initial weights: --init_std=0.02 --zero_init_residual=False gives the usual ones.
"""

# data: uncased, with our own BPE
dataset = 'wikitext103'
tokenizer = 'bpe'
vocab_size = 30522
lowercase = True
block_size = 128

# model: pre-norm, whole heads rotated, no norm before the vocabulary
arch = 'transformer'
causal = False
attention = 'mha'
n_layer = 6
n_embd = 256
n_head = 8
rope_dims = 32
learned_positions = False
norm = 'rms'
final_norm = False
mlp = 'swiglu'
mlp_hidden = 1024
mlp_bias = True
attention_dropout = 0.1  # and no other
init_std = 0.0625  # 1/sqrt(n_embd); with 0.02 the loss stays at token frequencies 200 steps longer
zero_init_residual = True  # 0.1 to 0.3 nats better after 300 small steps, for all encoders here
scale_latents = True  # where there are any: 0.1 to 0.25 nats, measured without zero_init_residual

# recipe
batch_size = 256
max_iters = 50_000
learning_rate = 5e-4
schedule = 'linear'  # after a warmup over a tenth of max_iters, the default
weight_decay = 0.01
beta2 = 0.999
mask_prob = 0.15
eval_interval = 1_000
eval_iters = 20
log_interval = 50
