"""Pre-training: masked-language modelling for encoders, next-token prediction for causal models.

    python train.py config/quick.py                                  # minutes on two cores
    python train.py config/mla_o.py --batch_size=32 --max_iters=300  # any option, after the config
    torchrun --nproc_per_node=8 train.py config/mla_o.py             # one process per GPU
    python train.py config/grouped.py --help                         # its options and their values
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# else `python -m train` would import the config.py or model.py of the folder where it is started
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import config  # before torch: from here on Ctrl-C is one line

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import prepare
from config import UserError
from deepseek import add_output_latent
from model import (ARCHITECTURES, ConfigError, Count, CountOrZero, MoE, NotNegative, OpenShare,
                   Positive, Share, cache_bytes, make_config, n_active_params, training_flops)
from prepare import DataOptions, Tokenizer
from run import (RESUMABLE, Device, Run, Seed, WeightOptions, best_checkpoint, build, build_empty,
                 check_export, describe, earlier_run, export, load_checkpoint, load_tokenizer,
                 load_weights, model_options_of, open_wandb, provenance, set_precision)

EVAL_MASK_PROB = 0.15  # whatever a run masks in training, so that masked accuracies compare
# Tokens per micro-batch if micro_batch_size is None: few on a CPU, where allocating memory costs
# more than arithmetic; many on a GPU, which would wait for kernel launches (not measured).
TOKENS_AT_A_TIME = dict(cpu=2 ** 12, mps=2 ** 14, cuda=2 ** 15)
CUT_TOKENS = 2 ** 16  # read for o_latent_init='data'
ANEW = 'use --init_from=RUN --out_dir=NEW to start a new run from its weights'
REFUSED = dict(gradient_accumulation_steps='batch_size counts all sequences of a step; set '
               'micro_batch_size to what fits a device, accumulation follows')


@dataclass
class TrainOptions(WeightOptions, DataOptions):
    """Training"""

    seed: Seed = 1337  # of initial weights, order of the data, masks and dropout
    arch: str = 'transformer'  # architecture, a key of model.ARCHITECTURES
    batch_size: Count = 32  # sequences per step, over all processes and accumulation
    micro_batch_size: Count | None = None  # most sequences per device at a time; None = what fits
    max_iters: Count = 5000  # optimizer steps
    max_seconds: Positive | None = None  # stop after this time, over which the rate decays
    learning_rate: Positive = 1e-3  # highest learning rate
    min_lr: NotNegative = 0.0  # where the schedule ends
    warmup_iters: CountOrZero | None = None  # steps of linear warmup; None = a tenth of the run
    lr_decay_iters: Count | None = None  # step at which the schedule ends; None = max_iters
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # wsd: falls in the last 40%
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for hidden matrices, adamw for the rest
    weight_decay: NotNegative = 0.1  # of matrices and embeddings
    beta1: Share = 0.9  # of adamw
    beta2: Share = 0.95  # of adamw
    grad_clip: NotNegative = 1.0  # largest norm of the gradient; 0 = off
    mask_prob: OpenShare = 0.15  # share of positions masked in training; evaluation is at 0.15
    eval_interval: Count = 500  # steps between evaluations, each followed by a checkpoint
    eval_iters: CountOrZero = 20  # batches of batch_size per evaluation; 0 = all validation data
    log_interval: Count = 10  # steps between printed lines
    out_dir: str | None = None  # run folder; None = out/CONFIG_NAME
    o_latent_init: Literal['data', 'svd', 'xavier'] = 'data'  # how W^O of init_from becomes two
    train_only: str | None = None  # regular expression of the names of what is trained; None = all
    init_from: str = 'scratch'  # scratch, resume, auto (resume if it can), a run, a DeepSeek
    eval_only: bool = False  # evaluate the model of init_from, then exit
    export: str | None = None  # write the model of init_from here for transformers, then exit
    dry_run: bool = False  # print parameters, FLOPs and cache bytes, then exit; needs no data
    compile: bool | None = None  # torch.compile; None = on CUDA only
    wandb: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.train_only or '')
        except re.error as error:
            raise UserError(f'train_only={self.train_only!r}: no regular expression '
                            f'({error})') from None
        if self.eval_only and self.export:
            raise UserError('eval_only and export: one at a time')
        if self.export and os.environ.get('WORLD_SIZE', '1') != '1':
            raise UserError('export: writes from one process: start it with python, not torchrun')
        if self.weights == 'bfloat16' and not (self.train_only or self.only_reads):
            raise UserError('weights=bfloat16: what is trained stays in float32, and here that is '
                            'all: set train_only or eval_only')
        if self.min_lr > self.learning_rate:
            raise UserError(f'min_lr={self.min_lr}: above learning_rate={self.learning_rate}, set '
                            'both')
        if self.lr_decay_iters and self.lr_decay_iters <= self.warmup and not self.max_seconds:
            raise UserError(f'lr_decay_iters={self.lr_decay_iters}: not after the warmup, which '
                            f'takes {self.warmup} steps: set warmup_iters too')

    @property
    def warmup(self):
        """Steps of the warmup."""
        return self.max_iters // 10 if self.warmup_iters is None else self.warmup_iters

    @property
    def only_reads(self):
        """Whether nothing is trained."""
        return self.eval_only or self.export is not None

    def trains(self, name):
        """Whether the parameter of this name is trained."""
        return not self.only_reads and re.search(self.train_only or '', name) is not None


# --------------------------------------------------------------------------------------------------
# options and model


def read_options(argv):
    """(TrainOptions, options of the model, the checkpoint to start from or None) of a command line.
    """
    config_classes = [config_class for _, config_class in ARCHITECTURES.values()]
    values, name = config.load(argv, TrainOptions, *config_classes, doc=__doc__, refused=REFUSED,
                               shown=option_classes)
    out_dir = values.get('out_dir') or f'out/{name or "default"}'
    init_from, latest = values.get('init_from', 'scratch'), Path(out_dir) / 'ckpt.pt'
    if init_from == 'auto':
        init_from = 'resume' if latest.exists() else 'scratch'
    state, inherited = None, {}
    if init_from == 'resume':
        state = load_checkpoint(latest, **RESUMABLE)
        inherited = state['options']
        for name in ('batch_size', 'seed', 'optimizer', 'mask_prob', 'tokenizer', 'lowercase',
                     'train_only'):
            if name in values and values[name] != inherited.get(name):
                raise UserError(f'{latest}: cannot go on with {name}={values[name]}, it was '
                                f'{inherited.get(name)}; {ANEW}')
    elif init_from != 'scratch':  # a new run, from the model and on the data of another
        state = load_checkpoint(best_checkpoint(init_from))
        names = {'arch'} | {option.name for option in fields(DataOptions)}
        names |= model_options_of(state['options']).keys() - {'dropout', 'attention_dropout'}
        if values.get('eval_only'):  # score as many windows as the evaluations of that run
            names |= {'batch_size', 'eval_iters'}
        inherited = {name: value for name, value in state['options'].items() if name in names}
    known = config.options_of(*option_classes(inherited))
    kinds = {name: known[name].type for name in inherited if name in known}
    config.check_content(inherited, kinds, f'the checkpoint of {init_from}', ANEW)
    flat = inherited | values | dict(out_dir=out_dir, init_from=init_from)
    return *split_options(flat), state


def option_classes(values):
    """The dataclasses whose options a run with these values has."""
    _, config_class = ARCHITECTURES.get(values.get('arch'), ARCHITECTURES['transformer'])
    return TrainOptions, config_class


def split_options(flat):
    """A flat dict of options -> (TrainOptions, options of the model)."""
    names = {option.name for option in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in flat.items() if name in names})
    model_options = {name: value for name, value in flat.items() if name not in names}
    vocab_size = options.vocab_size or prepare.vocab_size_of(options)
    return options, model_options | dict(vocab_size=vocab_size)


def is_cut(options, model_config, state):
    """Whether only the new run has an output latent, so that each W^O of the checkpoint `state` is
    replaced by two matrices."""
    return bool(state and model_config.o_latent and not state['options'].get('o_latent')
                and options.init_from != 'resume')


def start_model(options, model_config, state, origin, device, data):
    """The model at the first step: new, or from the checkpoint `state` of the folder `origin`.
    data: for o_latent_init='data', which reads the first sequences of training on the device."""
    cut, model_options = is_cut(options, model_config, state), model_config.options()
    low = getattr(torch, options.weights)

    def precision(name):
        return torch.float32 if options.trains(name) else low

    if cut:
        model_options |= dict(o_latent=None, o_norm='none', o_groups=1)
    if state:
        model = build_empty(options.arch, model_options, lambda name: (
            torch.float32 if cut and '.o_proj.' in name else precision(name)))
        load_weights(model, state, origin)
    else:
        model = build(options.arch, model_options)
    if cut:
        cut_output(model, options, model_config, device, data)
    set_precision(model, precision)
    trained = [parameter.requires_grad_(options.trains(name)).requires_grad
               for name, parameter in model.named_parameters()]
    if not any(trained) and not options.only_reads:
        raise UserError(f'train_only={options.train_only!r}: matches the name of no parameter; '
                        f'{next(model.named_parameters())[0]} is one')
    return model


def cut_output(model, options, wanted, device, data):
    """Replaces each W^O by the two matrices of the output latent that the config `wanted` has."""
    batches, n = (), -(-CUT_TOKENS // wanted.block_size)  # sequences
    if options.o_latent_init == 'data':
        model.to(device.torch_device)
        micro, _ = accumulation(options, wanted.block_size, device)
        inputs = (device.put(data.train.batch(range(first, min(first + micro, n))))[0]
                  for first in range(0, n, micro))
        # the logits of one position are the fewest there can be
        batches = ((idx, None, idx.new_zeros(len(idx), 1)) for idx in inputs)
    try:
        with device.autocast():
            add_output_latent(model, wanted.o_latent, options.o_latent_init, wanted.o_norm,
                              wanted.o_groups, batches)
    except ConfigError as error:
        raise UserError(str(error)) from None


def predicted_share(options, model_config):
    """Share of the tokens for which a training step needs logits."""
    n_masked = max(1, round(options.mask_prob * model_config.block_size))
    return 1.0 if model_config.causal else n_masked / model_config.block_size


def stats_of(options, model):
    """Sizes of a model, for run.json."""
    c = model.config
    per_token, fixed = cache_bytes(model, torch.float32) if c.causal else (None, None)
    flops = training_flops(model, c.block_size, predicted_share(options, c))
    return dict(parameters=model.n_params(),
                parameters_without_positions=model.n_params(positions=False),
                active_parameters=n_active_params(model), train_flops_per_token=flops,
                cache_bytes_per_token=per_token, cache_fixed_bytes=fixed)


def print_stats(options, stats):
    total, active, without, flops = (stats[name] for name in (
        'parameters', 'active_parameters', 'parameters_without_positions', 'train_flops_per_token'))
    parts = [f'{total:,} parameters ({without:,} without positions, {active:,} per token)',
             f'{flops / 1e6:.1f} MFLOP per token in training']
    if stats['cache_bytes_per_token'] is not None:
        parts.append(f'{stats["cache_bytes_per_token"]:,.0f} cache bytes per token in '
                     'float32')
    if stats['cache_fixed_bytes']:
        parts.append(f'at most {stats["cache_fixed_bytes"]:,.0f} more per sequence')
    print(f'{options.arch}: {", ".join(parts)}')


# --------------------------------------------------------------------------------------------------
# data: every sequence, and every mask, is a function of the seed and its own number alone


def hashed(*numbers):
    """64 random bits, as uint64, that are a function of these whole numbers, or of arrays of them,
    which broadcast. Each number selects an output of the generator splitmix64 (Steele et al. 2014),
    and that output is the seed for the next number."""
    bits = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        bits = bits + (np.array(number, dtype=np.uint64, ndmin=1) + 1) * 0x9E3779B97F4A7C15
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
        bits = bits ^ (bits >> 31)
    return bits


class Loader:
    """Windows of a token file by sequence number, masked for an encoder.

    Sequence k of epoch e is a function of (seed, e, k): each epoch shifts the grid of windows and
    takes each window once, in a new order. With fixed=n it is a test set that does not depend on
    the seed: n windows spread evenly over the file (0 = all), each always with the same mask.
    """

    def __init__(self, tokens, block_size, tokenizer, causal, seed=0, mask_prob=EVAL_MASK_PROB,
                 fixed=None):
        self.tokens, self.block_size, self.tokenizer = tokens, block_size, tokenizer
        self.causal, self.seed, self.fixed = causal, seed, fixed
        self.width = block_size + causal  # the targets of a causal model are one token later
        self.n_masked = max(1, round(mask_prob * block_size))
        if len(tokens) < self.width:
            name = os.path.relpath(getattr(tokens, 'filename', 'file'))  # train.bin or val.bin
            raise UserError(f'block_size={block_size}: longer than the data, {name} has only '
                            f'{len(tokens):,} tokens: take a smaller one, or more text')
        last = (len(tokens) - self.width) // block_size  # window, without a shift
        self.n_windows = max(1, last)  # the room for the shift takes one
        if fixed is not None:
            self.fixed = min(fixed or last + 1, last + 1)
            spread = np.linspace(0, last, self.fixed).astype(np.int64)
            self.test_starts = spread * block_size

    def starts(self, numbers):
        """First token of each numbered sequence."""
        if self.fixed is not None:
            return self.test_starts[numbers]
        return np.array([self.epoch(number // self.n_windows)[number % self.n_windows]
                         for number in numbers])

    @functools.lru_cache(maxsize=1)
    def epoch(self, number):
        """First token of each window, in the order of an epoch."""
        rng = np.random.default_rng((self.seed, number))
        room = len(self.tokens) - self.width - (self.n_windows - 1) * self.block_size
        shift = rng.integers(min(room + 1, self.block_size))
        return shift + rng.permutation(self.n_windows) * self.block_size

    def batch(self, numbers):
        """The inputs of a model for these sequences: (idx, targets), for an encoder (idx, targets,
        positions). Of the n_masked positions of a window (M), which are a hash of seed and window,
        80% become <|mask|>, 10% a random token, and 10% stay."""
        starts = self.starts(numbers)
        windows = self.tokens[starts[:, None] + np.arange(self.width)].astype(np.int64)
        if windows.max() >= self.tokenizer.ids_needed(self.causal):
            raise UserError(f'token id {windows.max()}: the tokenizer of these data does not have '
                            'it, prepare them again')
        if self.causal:  # contiguous, because a strided tensor goes to a GPU by a copy that blocks
            windows = torch.from_numpy(windows)
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        # a test window keeps its mask, however many others are scored with it
        keys = (np.array(numbers) if self.fixed is None else starts)[:, None]  # (B, 1)
        order = hashed(self.seed, keys, np.arange(self.block_size))  # (B, T): the lowest are masked
        positions = np.argpartition(order, self.n_masked - 1, axis=1)[:, :self.n_masked]
        positions.sort(axis=1)
        targets = np.take_along_axis(windows, positions, axis=1)  # (B, M)
        draw = hashed(self.seed, keys, positions, 1) * 2.0 ** -64  # from 0 to 1
        noise = hashed(self.seed, keys, positions, 2) % len(self.tokenizer.ranks)
        corrupted = np.select([draw < 0.8, draw < 0.9],
                              [self.tokenizer.mask, noise.astype(np.int64)], targets)
        np.put_along_axis(windows, positions, corrupted, axis=1)
        return tuple(map(torch.from_numpy, (windows, targets, positions)))


class Prefetcher:
    """A Loader that makes the next batch in a thread while the model works on this one. It expects
    the numbers of the next batch to be larger by `stride`, and makes any others when asked."""

    def __init__(self, loader, stride):
        self.loader, self.stride, self.prepared = loader, stride, {}
        self.thread = ThreadPoolExecutor(1)  # one, for the order of an epoch

    def batch(self, numbers):
        following = range(numbers.start + self.stride, numbers.stop + self.stride)
        prepared, submit = self.prepared, self.thread.submit
        batch = (prepared.get(numbers) or submit(self.loader.batch, numbers)).result()
        self.prepared = {following: submit(self.loader.batch, following)}
        return batch


def open_data(options, model_config, device, tokenizer=None):
    """The data that the options name, prepared first if it is absent: an object with folder, meta,
    tokenizer and the Loaders train, val and, for evaluation, train_eval with as many windows of the
    training split as val has. tokenizer: of the run that the model comes from, if any; the data has
    to be in its tokens."""
    folder = prepare.folder_of(options)
    if tokenizer and not holds(folder, options.source, tokenizer):
        folder = prepare.folder_of(options, tokenizer)  # the same data in its tokens
    if not folder.exists() and device.local_rank == 0:
        print(f'{folder} is absent: preparing it', flush=True)
        chosen = {option.name: getattr(options, option.name) for option in fields(DataOptions)}
        if options.tokenizer != 'bpe':
            chosen['vocab_size'] = None  # of the model; the tokenizer has its own
        prepare.prepare(prepare.PrepareOptions(**chosen), tokenizer)
    while not folder.exists():  # the process that prepares it may take hours
        time.sleep(1)
    meta, tokenizer = prepare.read_meta(folder), Tokenizer.load(folder / 'tokenizer.json')
    if options.source not in (None, meta['source']):
        prepare.local_files(options.source)  # raises UserError if there are none
        raise UserError(f'{folder} was prepared from {meta["source"]}, not {options.source}: '
                        'remove that folder, or run prepare.py with this source, which replaces it')
    needed = tokenizer.ids_needed(model_config.causal)
    if model_config.vocab_size < needed:
        raise UserError(f'vocab_size={model_config.vocab_size}: the tokenizer of {folder} needs '
                        f'{needed}')
    if device.first:
        prepare.warn_if_source_changed(folder)
    shared = model_config.block_size, tokenizer, model_config.causal
    train = Loader(prepare.read_tokens(folder, 'train'), *shared, options.seed, options.mask_prob)
    val = Loader(prepare.read_tokens(folder, 'val'), *shared,
                 fixed=options.eval_iters * options.batch_size)
    train_eval = Loader(train.tokens, *shared, fixed=val.fixed)
    return SimpleNamespace(folder=folder, meta=meta, tokenizer=tokenizer, train=train,
                           train_eval=train_eval, val=val)


def holds(folder, source, tokenizer):
    """Whether a data folder holds this source, None = any, in tokens of the tokenizer."""
    return (folder.exists() and source in (None, prepare.read_meta(folder)['source'])
            and Tokenizer.load(folder / 'tokenizer.json').digest() == tokenizer.digest())


# --------------------------------------------------------------------------------------------------
# optimizer and schedule


def parameter_groups(model):
    """[hidden matrices, embeddings, the rest] of a model: three lists of the parameters that are
    trained. Hidden matrices are the weights of linear layers, except lm_head, and three-dimensional
    parameters, which are stacks of matrices."""
    matrices, embeddings, rest = [], [], []
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            matrix = parameter.numel() and (  # not one without elements, which MLA may have
                parameter.dim() == 3 or isinstance(module, nn.Linear) and part != 'bias')
            embedding = isinstance(module, nn.Embedding) or name == 'lm_head'
            (embeddings if embedding else matrices if matrix else rest).append(parameter)
    grouped = matrices + embeddings + rest
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters())), 'in one group each'
    return [[p for p in group if p.requires_grad] for group in (matrices, embeddings, rest)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): a matrix takes a step along its
    momentum, orthogonalised. A parameter is a matrix or a stack of them, (n, a, b).

    It computes what torch.optim.Muon does with adjust_lr_fn='match_rms_adamw', but for all matrices
    of one shape together, because each would take 25 small kernels on a GPU."""

    momentum = 0.95

    @torch.no_grad()
    def step(self):
        group, by_shape = self.param_groups[0], {}
        for parameter in group['params']:
            by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
            if not self.state[parameter]:
                self.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        for shape, parameters in by_shape.items():
            grads = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]['momentum_buffer'] for parameter in parameters]
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            updates = torch._foreach_lerp(grads, momenta, self.momentum)  # Nesterov's
            matrices = torch.cat([update.view(-1, *shape) for update in updates])  # (n, *shape)
            steps = orthogonalized(matrices).type_as(matrices).split(
                [update.numel() // shape.numel() for update in updates])
            # this scale makes them as large as AdamW's, so that both take the same learning rates
            lr = group['lr'] * 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(parameters, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(parameters, [step.view_as(p) for step, p in zip(steps, parameters)],
                                alpha=-lr)


def orthogonalized(x):
    """Matrices x (n, a, b) with their singular values brought to between 0.5 and 1.5, in bfloat16:
    five Newton-Schulz iterations of the polynomial that is steepest at zero."""
    wide = x.size(1) <= x.size(2)
    x = (x if wide else x.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values up to one
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide else x.mT


def make_optimizers(model, options):
    """A list of optimizers that together step every parameter once."""
    matrices, embeddings, rest = parameter_groups(model)
    shared, optimizers = dict(lr=options.learning_rate, weight_decay=options.weight_decay), []
    if options.optimizer == 'muon':
        optimizers, matrices = [Muon([dict(params=matrices)], shared)], []
    groups = [dict(params=matrices + embeddings), dict(params=rest, weight_decay=0.0)]
    betas = options.beta1, options.beta2
    return optimizers + [torch.optim.AdamW(groups, betas=betas, fused=True, **shared)]


def learning_rate(options, step, seconds):
    """Linear warmup, then decay until lr_decay_iters. With max_seconds the decay follows the clock
    from the first step on, and the warmup is a tenth of the time unless warmup_iters says how many
    steps it takes."""
    warmup, end = options.warmup, options.lr_decay_iters or options.max_iters
    warm, progress = (step + 1) / max(1, warmup), (step - warmup) / max(1, end - warmup)
    if options.max_seconds:
        progress = seconds / options.max_seconds
        warm = progress / 0.1 if options.warmup_iters is None else warm
    progress = min(1.0, max(0.0, progress))
    factor = {'cosine': 0.5 * (1 + math.cos(math.pi * progress)), 'linear': 1 - progress,
              'wsd': min(1.0, (1 - progress) / 0.4)}[options.schedule]
    lr = options.min_lr + factor * (options.learning_rate - options.min_lr)
    return lr * min(1.0, warm)


# --------------------------------------------------------------------------------------------------
# evaluation


def evaluate(model, forward, data, batch_size, device):
    """A dict of scores: the loss on data.val and what follows from it, and the loss on as many
    windows of the training split. forward: the model or its compiled form."""
    loss, accuracy = mean_scores(model, forward, data.val, batch_size, device)
    train_loss, _ = mean_scores(model, forward, data.train_eval, batch_size, device)
    scores = dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700)))
    if data.val.causal:
        bits_per_byte = loss / math.log(2) / data.meta['bytes_per_token']
        scores |= dict(val_accuracy=accuracy, val_bits_per_byte=bits_per_byte)
    else:
        scores |= dict(val_masked_accuracy=accuracy)
    return scores | dict(train_eval_loss=train_loss)


@torch.no_grad()
def mean_scores(model, forward, loader, batch_size, device):
    """The mean loss and accuracy, without dropout, over the fixed windows of a loader, which the
    processes share out."""
    model.eval()
    sums, mine = np.zeros(2), np.arange(loader.fixed)[device.rank::device.world]
    for start in range(0, len(mine), batch_size):
        numbers = mine[start:start + batch_size]
        # shapes are static: the last batch is filled up, and what fills it is not scored
        batch = loader.batch(np.resize(numbers, batch_size))
        batch[1][len(numbers):] = -1
        with device.autocast():
            out = forward(*device.put(batch))
        sums += [out[name].item() * len(numbers) for name in ('loss', 'accuracy')]
    model.train()
    loss, correct = device.total(*sums)
    return loss / loader.fixed, correct / loader.fixed


@torch.no_grad()
def show_guesses(model, loader, device, n_sentences=4, length=40):
    """Prints stretches of held-out text with their masked tokens: [right guess], or
    [wrong guess|truth]."""
    decode = loader.tokenizer.decode
    numbers = np.linspace(0, loader.fixed - 1, min(n_sentences, loader.fixed)).astype(int)
    idx, targets, positions = loader.batch(numbers)
    with device.autocast():
        guesses = model.eval()(idx.to(device.torch_device)).argmax(dim=-1).cpu()
    truths = idx.scatter(1, positions, targets)
    print('\nheld-out text, 15% of it masked: [right guess] or [wrong guess|truth]\n')
    for row in range(len(idx)):
        words = [decode([token]) for token in truths[row, :length]]
        for t in positions[row][positions[row] < length]:
            right = guesses[row, t] == truths[row, t]
            words[t] = f'[{words[t]}]' if right else f'[{decode([guesses[row, t]])}|{words[t]}]'
        print('  ' + ' '.join(''.join(words).split()))
    print()


# --------------------------------------------------------------------------------------------------
# training


def compiled(options, model, device):
    """The model's compiled form, on CUDA or with --compile=True; else the model itself."""
    if not (device.cuda if options.compile is None else options.compile):
        return model
    if device.torch_device.type == 'cpu':
        # else threads add up an embedding's gradient in whatever order they finish
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    # after eight models in one process, as in bench.py, torch would run the next ones uncompiled
    # and say nothing
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(model, dynamic=False)  # static shapes


def accumulation(options, block_size, device):
    """(micro-batch size, micro-batches per step), both of one process."""
    share, rest = divmod(options.batch_size, device.world)
    if rest:
        raise UserError(f'batch_size={options.batch_size} does not divide into {device.world} '
                        'processes: change one of them')
    fitting = TOKENS_AT_A_TIME.get(device.torch_device.type, 2 ** 12) // block_size
    most = min(share, options.micro_batch_size or max(1, fitting))
    micro = next(n for n in range(most, 0, -1) if share % n == 0)
    return micro, share // micro


def train_step(runner, optimizers, data, step, options, device, micro, n_accumulation):
    """One optimizer step on the step's own sequences. Returns the means of what the model reports,
    `loss` and its terms, and the norm of the gradient, as tensors."""
    # dropout is a function of (seed, step, rank); they are hashed, because the CPU's generator
    # keeps 32 bits of a seed
    entropy = np.random.SeedSequence((options.seed, step, device.rank)).generate_state(1)
    torch.manual_seed(int(entropy[0]))
    means = {}
    for k in range(n_accumulation):
        # this process's part of the one global order of sequences
        first = step * options.batch_size + (k * device.world + device.rank) * micro
        batch = device.put(data.batch(range(first, first + micro)))
        last = k == n_accumulation - 1  # only then do the processes exchange gradients
        with contextlib.nullcontext() if last or device.world == 1 else runner.no_sync():
            with device.autocast():
                out = runner(*batch)
            (out['loss'] / n_accumulation).backward()
        for name, value in out.items():
            means[name] = means.get(name, 0.0) + value.detach() / n_accumulation
    norm = nn.utils.clip_grad_norm_(runner.parameters(), options.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    runner.zero_grad(set_to_none=True)
    for layer in mixtures(runner):
        if device.world > 1:
            dist.all_reduce(layer.load)
        if optimizers:
            layer.balance()
        else:
            layer.load.zero_()
    return means, norm


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def stop_if_not_finite(step, *values):
    """Ends the run with a line on stderr and status 1 if a value is not finite."""
    if not all(map(math.isfinite, values)):
        sys.exit(f'step {step}: the loss or its gradient is not finite, the run stops; what was '
                 'saved before is kept. A lower learning_rate or a longer warmup usually helps')


class Stopwatch:
    """Training time in seconds, without the time spent inside `paused`."""

    def __init__(self, seconds):
        self.since = time.perf_counter() - seconds

    def read(self):
        return time.perf_counter() - self.since

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


def catch_signals():
    """Handles SIGTERM and SIGINT from now on by adding them to the list that it returns, so that
    the current step can finish."""
    caught = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: caught.append(number))
    return caught


def restore(optimizers, checkpoint):
    """Loads the state of the optimizers from a checkpoint. Learning rate, weight decay and the like
    are what the options now say. Raises UserError if it is the state of other optimizers."""
    try:
        for optimizer, saved in zip(optimizers, checkpoint['optimizers'], strict=True):
            ours, theirs = optimizer.state_dict()['param_groups'], saved['param_groups']
            shapes = [p.shape for group in optimizer.param_groups for p in group['params']]
            # a fused step on moments of another shape would write past their end
            fits = all(value.shape in (shapes[i], ())
                       for i, moments in saved['state'].items() for value in moments.values())
            kinds = {tuple(moments) for moments in saved['state'].values()}
            if (not fits or len(kinds) > 1
                    or [group.keys() for group in ours] != [group.keys() for group in theirs]):
                raise ValueError('other moments')
            optimizer.load_state_dict(saved | dict(param_groups=ours))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f'the checkpoint holds the state of another optimizer: {ANEW}') from None


def report(run, options, device, step, now, lr, means, grad_norm, seconds_per_step, model):
    """Logs and prints the training loss of a step, `now` seconds into the run."""
    sums = device.total(*(value.item() for value in means.values()))
    terms = {name: total / device.world for name, total in zip(means, sums)}
    stop_if_not_finite(step, terms['loss'], grad_norm)
    tokens_per_step = options.batch_size * model.config.block_size
    rate = tokens_per_step / seconds_per_step
    mfu, memory = device.mfu(rate * run.stats['train_flops_per_token']), device.memory_gb()
    run.record(step=step, tokens=step * tokens_per_step, seconds=now, lr=lr, grad_norm=grad_norm,
               tokens_per_second=rate, memory_gb=memory, **(dict(mfu=mfu) if mfu else {}),
               **{f'train_{name}': value for name, value in terms.items()}, **expert_load(model))
    left = min((options.max_iters - step) * seconds_per_step,
               (options.max_seconds or math.inf) - now)
    run.log(f'step {step}{"" if options.max_seconds else f"/{options.max_iters}"}: '
            f'{describe(terms)}, lr {lr:.1e}, norm {grad_norm:.2f}, {rate:,.0f} tokens/s'
            f'{f", {mfu:.0%} MFU" if mfu else ""}, {memory:.1f} GB, '
            f'{timedelta(seconds=max(0, round(left)))} left')


def expert_load(model):
    """How the last step shared tokens out among experts, for metrics.jsonl: a list per layer with
    experts, and the largest share as a multiple of the mean. {} without experts."""
    loads = [layer.last_load for layer in mixtures(model)]
    if not loads:
        return {}
    busiest = max((load.max() / load.mean()).item() for load in loads)
    return dict(expert_shares=[[round(x, 5) for x in (load / load.sum()).tolist()]
                               for load in loads], busiest_expert=busiest)


def train(options, model, forward, checkpoint, device, data, micro, n_accumulation):
    """Trains to the end, or until a signal. forward: the model or its compiled form. checkpoint:
    the one to resume from, or None. micro, n_accumulation: see `accumulation`."""
    optimizers = make_optimizers(model, options)
    step, seconds, best = 0, 0.0, math.inf
    if checkpoint:
        step, seconds, best = checkpoint['step'], checkpoint['seconds'], checkpoint['best']
        restore(optimizers, checkpoint)
    if device.total(step)[0] != step * device.world:
        raise UserError(f'the processes found checkpoints of different steps in {options.out_dir}: '
                        'it has to be on a disk that all of them share')
    runner = forward
    if device.world > 1:
        runner = DistributedDataParallel(forward, forward_sync_buffers=False,
                                         device_ids=[device.torch_device] if device.cuda else None)
    T, stats = model.config.block_size, stats_of(options, model)
    tokens_per_step = options.batch_size * T
    if device.first:
        print_stats(options, stats)
    started_from = (checkpoint['provenance'].get('started_from') if checkpoint
                    else options.init_from)
    stats |= provenance(device, data.meta, data.tokenizer) | dict(started_from=started_from)
    signals, batches = catch_signals(), Prefetcher(data.train, stride=micro * device.world)
    if forward is not model:
        # A step without optimizers compiles the model and changes no weights, so that the minutes
        # of compiling are not training time. (Evaluation compiles while the clock is paused.) If it
        # fails, an earlier run is still in its place.
        train_step(runner, [], batches, step, options, device, micro, n_accumulation)
    project = 'causal-pretrain' if model.config.causal else 'encoder-pretrain'
    run = Run(options.out_dir, dataclasses.asdict(options) | model.config.options(), stats,
              data.tokenizer, device.first, checkpoint, project if options.wandb else None)
    run.log(f'{device.describe()}, {"bfloat16" if device.bf16 else "float32"}'
            f'{"" if forward is model else ", compiled"}, {device.world} processes x '
            f'{n_accumulation} micro-batches x {micro} sequences of {T} tokens per step; run '
            f'folder {options.out_dir}')
    if step >= options.max_iters:
        run.log(f'nothing is left to do: the checkpoint is at step {step}')
    watch, first_step, reported = Stopwatch(seconds), step, (step, seconds)

    while True:
        # all processes must decide alike: a signal to any stops all, and rank 0's clock counts
        stop, seconds = device.total(len(signals), watch.read() if device.first else 0.0)
        done = step >= options.max_iters or seconds >= (options.max_seconds or math.inf)
        new = step > first_step  # False: no step yet in this process, so nothing new to save
        due = (new or step == 0) and (done or step % options.eval_interval == 0)

        # evaluate and save, when due
        if due or stop:
            if new:  # waits for the steps that a GPU still has to do, and their time counts
                stop_if_not_finite(step, means['loss'].item(), norm.item())
            with watch.paused():
                improved = False
                if due:
                    scores = evaluate(model, forward, data, micro, device)
                    stop_if_not_finite(step, scores['val_loss'])
                    run.record(step=step, tokens=step * tokens_per_step, seconds=seconds, **scores)
                    run.log(f'step {step}: {describe(scores)}')
                    improved = new and scores['val_loss'] < best
                if improved:
                    best = scores['val_loss']
                state = dict(model=model.state_dict(), step=step, seconds=seconds, best=best,
                             optimizers=[optimizer.state_dict() for optimizer in optimizers])
                if improved:  # first: a kill in between must not leave a `best` without its weights
                    run.save('ckpt_best.pt', state)
                if new or stop:
                    run.save('ckpt.pt', state)
        if done or stop:
            break

        # step
        lr = learning_rate(options, step, seconds)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
        means, norm = train_step(runner, optimizers, batches, step, options, device, micro,
                                 n_accumulation)
        step += 1

        # report, when due
        if step % options.log_interval == 0:
            grad_norm, now = norm.item(), watch.read()  # in this order: the first waits for a GPU
            seconds_per_step = (now - reported[1]) / (step - reported[0])
            report(run, options, device, step, now, lr, means, grad_norm, seconds_per_step, model)
            reported = step, now

    if not done:
        run.log(f'stopped by a signal at step {step}, saved; --init_from=resume continues it')
    elif device.first and not model.config.causal:
        show_guesses(model, data.val, device)
    run.close()


def main():
    options, model_options, state = read_options(sys.argv[1:])
    torch.manual_seed(options.seed)
    if options.dry_run:
        with torch.device('meta'):
            model = build(options.arch, model_options)
        return print_stats(options, stats_of(options, model))
    if state is None and options.only_reads:
        raise UserError('eval_only and export need a trained model: say which with --init_from=RUN')
    origin = Path(options.out_dir if options.init_from == 'resume' else options.init_from)
    model_config, tokenizer = build(options.arch, model_options, make_config), None
    if state:
        tokenizer = load_tokenizer(origin, state, model_config, origin, 'copy both from one run')
    if options.export:
        check_export(model_config, options.export)
    device = Device(options)
    micro, n_accumulation = accumulation(options, model_config.block_size, device)
    resuming = options.init_from == 'resume' and not options.only_reads
    if device.first and not options.only_reads:  # whatever can refuse does so before all else
        if not resuming:
            earlier_run(options.out_dir)
        if options.wandb:
            open_wandb()
    # before the model is built: a block_size beyond the data could take all memory
    data = None
    if not options.export or (options.o_latent_init == 'data'
                              and is_cut(options, model_config, state)):
        data = open_data(options, model_config, device, tokenizer)
    if resuming and state['provenance'].get('data_sha256') != data.meta['sha256']:
        raise UserError(f'{origin}: was trained on other data than {data.folder} holds; {ANEW}')
    model = start_model(options, model_config, state, origin, device, data)
    if options.export:
        export(model.cpu(), tokenizer, options.export)
        return print(f'{options.export}: step {state["step"]} of {origin}, for transformers')
    forward = compiled(options, model.to(device.torch_device), device)
    try:
        if options.eval_only:
            scores = evaluate(model, forward, data, micro, device)
            if device.first:
                print(f'step {state["step"]} of {origin} on {data.val.fixed:,} validation '
                      f'sequences of {data.folder}: {describe(scores)}')
        else:
            train(options, model, forward, state if resuming else None, device, data, micro,
                  n_accumulation)
    except RuntimeError as error:
        if forward is model or not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            raise
        lines = str(error.inner_exception).splitlines()
        reason = next((line for line in lines if 'error:' in line), lines[0])
        raise UserError(f'torch.compile: {reason}: install what is missing, or use '
                        '--compile=False') from None
    if device.world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    config.run(main)
