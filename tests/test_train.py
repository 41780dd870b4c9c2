"""train.py: data order, masks, optimizers and schedules; runs that stop, resume or start over; what
it refuses."""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import finetune_sst2
import prepare
import run
import train
from config import UserError
from conftest import ENCODER, REPOSITORY, SMALL, TIMES, corpus, metrics, same_state, shell, timeless
from deepseek import add_output_latent
from model import cache_bytes, make_model
from prepare import Tokenizer
from run import DeviceOptions, bfloat16_is_faster, load_checkpoint, load_run, save_checkpoint
from train import Loader, TrainOptions, learning_rate

BYTES = prepare.make_tokenizer('byte')
EXPERTS = ['--mlp=moe', '--n_routed_experts=8', '--expert_hidden=16', '--n_group=2',
           '--balance_rate=0.01', '--first_k_dense=1']
PLAIN_ENCODER = [argument for argument in ENCODER if 'dropout' not in argument]
RESUME = '--init_from=resume'


# -- data order ------------------------------------------------------------------------------------


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('n_tokens', [1000, 1015, 1016, 1017, 40])
def test_each_epoch_takes_every_window_once_on_a_grid_of_its_own(n_tokens, causal):
    loader = Loader(np.arange(n_tokens), 16, BYTES, causal, seed=3)
    grids = []
    for epoch in range(8):
        starts = loader.starts(range(epoch * loader.n_windows, (epoch + 1) * loader.n_windows))
        assert sorted(starts) == list(range(min(starts), min(starts) + 16 * loader.n_windows, 16))
        assert min(starts) < 16 and max(starts) + 16 + causal <= n_tokens
        # the tokens left out are fewer than those of two windows
        assert n_tokens - (max(starts) + 16 + causal) < 2 * 16
        grids.append(list(starts))
    if n_tokens > 100:
        assert len({min(grid) for grid in grids}) > 3 and grids[0] != sorted(grids[0])
    first, second = ([start - min(grid) for start in grid] for grid in grids[:2])
    assert n_tokens < 100 or first != second


def test_a_sequence_is_a_function_of_seed_and_number_alone():
    tokens = np.random.default_rng(0).integers(0, 256, 5000)
    make = lambda seed=3, causal=False: Loader(tokens, 32, BYTES, causal, seed=seed)
    numbers = list(range(290, 330))  # across an epoch's end
    together = make().batch(numbers)
    shuffled = make().batch(numbers[::-1])
    for whole, reverse in zip(together, shuffled):
        assert torch.equal(whole, reverse.flip(0))
    for i, number in enumerate(numbers):
        alone = make().batch([number])
        assert all(torch.equal(part[i], single[0]) for part, single in zip(together, alone))
    assert not torch.equal(together[0], make(seed=4).batch(numbers)[0])
    idx, targets = make(causal=True).batch(numbers)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    assert idx.is_contiguous() and targets.is_contiguous()  # or a copy to a GPU blocks


def process(rank=0, world=1, kind='cpu'):
    """A Device, as far as the data need one."""
    return SimpleNamespace(rank=rank, world=world, torch_device=torch.device(kind),
                           put=lambda batch: batch, autocast=contextlib.nullcontext)


@pytest.mark.parametrize('batch_size, block_size, world, kind, expected', [
    (256, 128, 1, 'cpu', (32, 8)), (256, 128, 4, 'cuda', (64, 1)), (800, 200, 1, 'cpu', (20, 40)),
    (6, 5000, 2, 'cpu', (1, 3)), (7, 100, 1, 'cuda', (7, 1)), (94, 128, 1, 'cpu', (2, 47))])
def test_a_device_takes_what_fits_it(batch_size, block_size, world, kind, expected):
    options = TrainOptions(batch_size=batch_size)
    assert train.accumulation(options, block_size, process(0, world, kind)) == expected


@pytest.mark.parametrize('world, micro', [
    (1, 1), (1, 4), (1, 12), (2, 1), (2, 2), (2, 6), (4, 1), (4, 3)])
def test_processes_and_accumulation_share_one_global_order(world, micro):
    """A step takes the same sequences over 1, 2 and 4 processes, in micro-batches of any size."""
    class Runner(torch.nn.Linear):
        no_sync = contextlib.nullcontext

        def forward(self, x):
            return {'loss': super().forward(x).sum()}

    options = TrainOptions(batch_size=12, micro_batch_size=micro)
    for step in range(3):
        numbers = []
        data = SimpleNamespace(batch=lambda part: numbers.extend(part) or [torch.ones(1, 4)])
        for rank in range(world):
            device = process(rank, world)
            train.train_step(Runner(4, 1), [], data, step, options, device,
                             *train.accumulation(options, 8, device))
        assert sorted(numbers) == list(range(step * 12, step * 12 + 12))
    with pytest.raises(UserError, match='does not divide into 16 processes'):
        train.accumulation(TrainOptions(batch_size=12), 8, process(world=16))


def test_the_next_batch_is_prefetched():
    loader = Loader(np.arange(1000) % 256, 16, BYTES, causal=False, seed=3)
    made, prefetcher = [], train.Prefetcher(loader, stride=4)
    batch_of = loader.batch
    loader.batch = lambda numbers: made.append(numbers) or batch_of(numbers)
    asked = range(0, 2), range(4, 6), range(8, 10), range(4, 6), range(8, 10)
    for numbers in asked:
        for part, wanted in zip(prefetcher.batch(numbers), batch_of(numbers), strict=True):
            assert torch.equal(part, wanted)
    prefetcher.thread.shutdown()
    assert made == [*asked[:3], range(12, 14), *asked[3:], range(12, 14)]


def share_is(events, wanted):
    """Whether the share of true events is the wanted one, to five standard errors."""
    return abs(events.mean() - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / events.size)


def test_masking_statistics():
    tokens, n = np.random.default_rng(0).integers(0, 256, 60_000), 4000
    loader = Loader(tokens, 100, BYTES, causal=False, seed=1, mask_prob=0.15)
    idx, targets, positions = (part.numpy() for part in loader.batch(range(n)))
    plain = np.stack([tokens[s:s + 100] for s in loader.starts(range(n))])
    assert positions.shape == targets.shape == (n, 15)  # a fixed number per sequence
    assert (np.diff(positions) > 0).all()
    assert (np.take_along_axis(plain, positions, 1) == targets).all()
    chosen = np.zeros(plain.shape, dtype=bool)
    np.put_along_axis(chosen, positions, True, axis=1)
    assert (idx == plain)[~chosen].all()
    seen = np.take_along_axis(idx, positions, 1)
    masked, kept = seen == BYTES.mask, seen == targets
    noise = seen[~masked & ~kept]
    assert share_is(masked, 0.8) and share_is(kept, 0.1 + 0.1 / 256)
    assert noise.max() < 256  # any real token alike, no special one
    counts = np.bincount(noise, minlength=256)
    assert abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    # no position is preferred, and what happens to one does not depend on where it is
    assert all(share_is(column, 0.15) for column in chosen.T)
    assert all(share_is(masked[positions == t], 0.8) for t in range(100))
    # nothing is carried over: to the next position, window, or epoch, or from seed to seed
    pair = 0.15 * 14 / 99  # of positions of one window, which has 15 of 100
    assert share_is(chosen[:, 1:] & chosen[:, :-1], pair)
    assert share_is(chosen[1:] & chosen[:-1], 0.15 ** 2)
    assert share_is(masked[:, 1:] & masked[:, :-1], 0.8 ** 2)
    assert share_is(masked[1:] & masked[:-1], 0.8 ** 2)
    for seed, first in ((1, loader.n_windows), (2, 0)):
        other = Loader(tokens, 100, BYTES, causal=False, seed=seed)
        again = np.zeros(plain.shape, dtype=bool)
        np.put_along_axis(again, other.batch(range(first, first + n))[2].numpy(), True, axis=1)
        assert share_is(chosen & again, 0.15 ** 2)


def test_evaluation_is_the_mean_over_all_windows_whatever_the_batch():
    tokens = np.random.default_rng(0).integers(0, 256, 1200)
    torch.manual_seed(0)
    model = make_model('transformer', vocab_size=259, block_size=32, n_layer=1, n_head=2,
                       n_embd=16, causal=False)
    for fixed in (0, 5):
        loader = Loader(tokens, 32, BYTES, causal=False, fixed=fixed)
        scores = []
        for world, batch_size in ((1, 1), (1, 4), (2, 3), (7, 2)):
            parts = []
            for rank in range(world):
                device = process(rank, world)
                device.total = lambda *values: parts.append(values) or (0, 0)
                train.mean_scores(model, model, loader, batch_size, device)
            scores.append(np.sum(parts, axis=0) / loader.fixed)
        assert np.allclose(scores, scores[0], rtol=1e-5)


def test_the_test_set_is_fixed_and_spread_over_the_file():
    tokens = np.random.default_rng(0).integers(0, 256, 10_000)
    loader = Loader(tokens, 32, BYTES, causal=False, fixed=50)
    starts = loader.starts(np.arange(50))
    assert starts[0] == 0 and starts[-1] == (10_000 // 32 - 1) * 32 and len(set(starts)) == 50
    whole = Loader(tokens, 32, BYTES, causal=True, fixed=0)
    assert whole.fixed == (10_000 - 1) // 32 == len(set(whole.starts(np.arange(whole.fixed))))
    # a window keeps its mask, however many others are scored with it
    all_windows = Loader(tokens, 32, BYTES, causal=False, fixed=0)
    same = list(all_windows.starts(np.arange(all_windows.fixed))).index(starts[1])
    assert torch.equal(all_windows.batch([same])[2], loader.batch([1])[2])


# -- optimizers, schedules -------------------------------------------------------------------------


def test_every_parameter_is_in_exactly_one_group():
    base = dict(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)
    for options in (dict(attention='mla', kv_latent=8, q_latent=8, o_latent=8, o_norm='head',
                         mlp_rank=4, vocab_rank=8),
                    dict(tie_embeddings=False, bias=True, mlp_bias=True, qk_norm=True),
                    dict(mlp='moe', n_routed_experts=4, expert_hidden=8),
                    dict(attention='mla', kv_latent=8, rope_key='shared', rope_dims=8)):
        model = make_model('transformer', **base, **options)
        for kind in ('adamw', 'muon'):
            recipe = TrainOptions(optimizer=kind, weight_decay=0.5)
            groups = [group for optimizer in train.make_optimizers(model, recipe)
                      for group in optimizer.param_groups]
            held = [id(p) for group in groups for p in group['params']]
            assert sorted(held) == sorted(map(id, model.parameters()))
            decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
            for name, p in model.named_parameters():
                decays = p.dim() > 1 and p.numel() and not name.endswith('gain')
                assert (id(p) in decayed) == bool(decays), name
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            for optimizer in train.make_optimizers(model, recipe):
                optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())


def test_muon_treats_each_matrix_as_that_of_torch_does():
    """Matrices of one shape are orthogonalised together, those of a stack too."""
    torch.manual_seed(0)
    shapes = (12, 8), (8, 12), (2, 12, 8)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    matrices = [*parameters[:2], *parameters[2].unbind()]
    apart = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    ours = train.Muon(parameters, dict(lr=0.1, weight_decay=0.3))
    theirs = torch.optim.Muon(apart, lr=0.1, weight_decay=0.3, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        grads = parameters[0].grad, parameters[1].grad, *parameters[2].grad
        for part, grad in zip(apart, grads):
            part.grad = grad.clone()
        ours.step()
        theirs.step()
        for group in ours.param_groups + theirs.param_groups:
            group['lr'] *= 0.5
    for ours, theirs in zip(matrices, apart):
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-3)  # updates are in bfloat16


def test_schedules():
    base = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)

    def at(step, seconds=0.0, **options):
        return learning_rate(TrainOptions(**base | options), step, seconds)

    for schedule in ('cosine', 'linear', 'wsd'):
        assert [at(step, schedule=schedule) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
        assert (math.isclose(at(110, schedule=schedule), 0.1)
                and math.isclose(at(500, schedule=schedule), 0.1))
    assert (math.isclose(at(60), 0.1 + 0.9 * 0.5)
            and math.isclose(at(35), 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert math.isclose(at(60, schedule='linear'), 0.55)
    assert at(70, schedule='wsd') == 1.0 and math.isclose(at(90, schedule='wsd'), 0.55)
    assert math.isclose(at(60, schedule='linear', lr_decay_iters=210), 0.1 + 0.9 * 0.75)
    assert math.isclose(at(4, warmup_iters=None, max_iters=100), 0.5)  # a tenth of max_iters
    # with max_seconds the decay follows the clock, the warmup still the steps
    assert math.isclose(at(50, 30.0, schedule='linear', max_seconds=60.0), 0.55)
    assert math.isclose(at(4, 30.0, schedule='linear', max_seconds=60.0), 0.275)
    # without warmup_iters the warmup takes a tenth of the time, however many steps there may be
    timed = dict(schedule='linear', max_seconds=60.0, warmup_iters=None, max_iters=10 ** 6)
    assert math.isclose(at(50, 30.0, **timed), 0.55) and math.isclose(at(9, 6.0, **timed), 0.91)
    assert math.isclose(at(9, 3.0, **timed), 0.5 * (0.1 + 0.9 * 0.95))


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments', [[], ENCODER, ['--optimizer=muon', '--schedule=wsd', '--micro_batch_size=2']],
    ids=['decoder', 'encoder', 'muon'])
def test_a_run_learns_and_leaves_its_folder(data, script, capsys, arguments):
    script(train, *SMALL, '--max_iters=60', '--eval_interval=30', '--learning_rate=1e-2',
           *arguments)
    out = capsys.readouterr().out
    assert 'data/text-byte is absent: preparing it' in out and '0:00:00 left' in out
    assert {path.name for path in Path('run').iterdir()} == {
        'ckpt.pt', 'ckpt_best.pt', 'config.json', 'metrics.jsonl', 'run.json', 'tokenizer.json',
        'loss.png', '.lock'}
    lines = metrics()
    evaluations = [line for line in lines if 'val_loss' in line]
    assert [line['step'] for line in evaluations] == [0, 30, 60]
    assert [line['step'] for line in lines if 'train_loss' in line] == list(range(1, 61))
    assert abs(evaluations[0]['val_loss'] - math.log(259)) < 0.2
    assert evaluations[-1]['val_loss'] < evaluations[0]['val_loss'] - 1.5
    last = evaluations[-1]
    assert (last['tokens'] == 60 * 8 * 32
            and math.isclose(last['val_perplexity'], math.exp(last['val_loss'])))
    if '--causal=False' in arguments:
        # of 80 positions; guesses without training would be right at one in 259
        assert (last['val_masked_accuracy'] > 0.05 and '[right guess]' in out
                and 'val_bits_per_byte' not in last)
    else:
        val = prepare.read_tokens('data/text-byte', 'val')
        bytes_per_token = (val < 256).sum() / len(val)  # all but <|endoftext|>
        bits_per_token = last['val_loss'] / math.log(2)
        assert math.isclose(last['val_bits_per_byte'], bits_per_token / bytes_per_token)
    state = load_checkpoint('run/ckpt.pt')
    provenance = state['provenance']
    assert provenance['torch'] == torch.__version__ and 'train.py' in provenance['command']
    assert state['options'] == json.loads(Path('run/config.json').read_text())

    model, tokenizer, options = load_run('run')
    assert not model.training and options['n_embd'] == 32 and tokenizer.vocab_size == 259
    assert all(torch.equal(weight, load_checkpoint('run/ckpt_best.pt')['model'][name])
               for name, weight in model.state_dict().items())
    capsys.readouterr()
    stats = json.loads(Path('run/run.json').read_text())
    assert stats['parameters'] == model.n_params() and stats['device'].startswith('cpu')
    assert (stats['cache_bytes_per_token'] is None) == ('--causal=False' in arguments)
    script(train, '--init_from=run', '--eval_only=True')
    best = min(line['val_loss'] for line in evaluations)
    score = f'of run on 16 validation sequences of data/text-byte: loss {best:.4f}, perplexity'
    assert score in capsys.readouterr().out


ENCDEC = ['--arch=encoder_decoder', '--embedding_loss=mse', '--subtract_next_position=True',
          '--n_layer=1', '--dropout=0.1']
GROUPED = ['--arch=grouped_latent', '--group_size=8', '--latents=4,1', '--widths=32,32,32',
           '--head_dim=16', '--dropout=0.1', '--latent_loss=True', '--n_channels=2']


def small(arguments):
    """SMALL and further arguments; grouped latents have no n_head and n_embd."""
    foreign = ('--n_head=2', '--n_embd=32') if '--arch=grouped_latent' in arguments else ()
    return [argument for argument in SMALL if argument not in foreign] + list(arguments)


RESUMED = {
    'encoder': ENCODER,
    'accumulation': ['--micro_batch_size=2', '--dropout=0.1'],
    'muon': ['--optimizer=muon', '--dropout=0.1'],
    'encoder_decoder': ENCDEC,
    'grouped': GROUPED,
    'experts': [*EXPERTS, '--micro_batch_size=4'],
    'experts_muon': [*EXPERTS, '--optimizer=muon'],
    'grouped_muon': [*GROUPED, '--optimizer=muon'],
    'compiled': ['--compile=True', '--dropout=0.1'],
}


@pytest.mark.parametrize('arguments', [
    pytest.param(value, id=name, marks=() if name == 'encoder' else pytest.mark.slow)
    for name, value in RESUMED.items()])
def test_a_resumed_run_is_bit_identical(runs, script, request, arguments):
    straight = 'encoder'
    if arguments is not ENCODER:
        straight = 'straight'
        if '--compile=True' in arguments:  # threads could add up gradients in any order
            request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
            torch.set_num_threads(2)
        script(train, *small(arguments), '--out_dir=straight')
    for stop in (3, 5):  # at an evaluation, and between two
        common = f'--out_dir=run{stop}', '--eval_interval=100'
        script(train, *small(arguments), f'--max_iters={stop}', '--lr_decay_iters=6', *common)
        script(train, *small(arguments), RESUME, *common)
        same_state(f'{straight}/ckpt.pt', f'run{stop}/ckpt.pt')
        train_lines = [[line for line in timeless(metrics(name)) if 'train_loss' in line]
                       for name in (straight, f'run{stop}')]
        assert train_lines[0] == train_lines[1]


def test_an_optimizer_without_state_trains_and_resumes(runs, script, monkeypatch):
    monkeypatch.setattr(train, 'make_optimizers', lambda model, options: [
        torch.optim.SGD(model.parameters(), lr=options.learning_rate)])
    resume = '--init_from=resume', '--max_iters=8'
    with pytest.raises(UserError, match='holds the state of another optimizer'):
        script(train, *resume, '--out_dir=decoder')
    script(train, *SMALL, '--max_iters=8', '--out_dir=straight')
    script(train, *SMALL, '--lr_decay_iters=8')
    script(train, *resume, '--out_dir=run')
    same_state('straight/ckpt.pt', 'run/ckpt.pt')


def test_moments_of_another_shape_are_refused(runs, script):
    path = Path('decoder/ckpt.pt')
    state = load_checkpoint(path)
    state['optimizers'][0]['state'][0]['exp_avg'] = torch.zeros(3, 3)
    save_checkpoint(path, state)
    with pytest.raises(UserError, match='holds the state of another optimizer'):
        script(train, RESUME, '--out_dir=decoder', '--max_iters=8')


@pytest.mark.slow
def test_a_signal_saves_and_a_restart_goes_on_to_the_same_end(data, script):
    script(train, *SMALL, '--out_dir=straight', '--max_iters=250', '--eval_interval=1000',
           '--dropout=0.1')
    for kind in (signal.SIGTERM, signal.SIGINT):
        command = [*SMALL, f'--out_dir={kind.name}', '--max_iters=250', '--eval_interval=1000',
                   '--dropout=0.1', '--init_from=auto']
        run = subprocess.Popen([sys.executable, str(REPOSITORY / 'train.py'), *command],
                               stdout=subprocess.PIPE, text=True)
        while (not any('step 20/' in line for line in iter(run.stdout.readline, ''))
               and run.poll() is None):
            pass
        run.send_signal(kind)
        out = run.communicate(timeout=60)[0]
        assert run.returncode == 0 and 'stopped by a signal at step' in out
        assert 20 <= load_checkpoint(f'{kind.name}/ckpt.pt')['step'] < 250
        script(train, *command)
        same_state('straight/ckpt.pt', f'{kind.name}/ckpt.pt')
        assert timeless(metrics(kind.name)) == timeless(metrics('straight'))


def test_a_run_with_experts_reports_their_load(data, script, capsys):
    script(train, *SMALL, *EXPERTS, '--log_interval=2')
    lines = [line for line in metrics() if 'train_loss' in line]
    assert ' per token), ' in capsys.readouterr().out
    assert Path('run/experts.png').is_file()
    for line in lines:
        shares, = line['expert_shares']  # the first of two layers is dense
        assert len(shares) == 8 and math.isclose(sum(shares), 1, abs_tol=1e-4)
        assert math.isclose(max(shares) * 8, line['busiest_expert'], abs_tol=1e-3)
    bias = load_checkpoint('run/ckpt.pt')['model']['blocks.1.mlp.router_bias']
    steps = (bias / 0.01).round()  # by which the six steps have moved it
    assert torch.allclose(bias, steps * 0.01, atol=1e-6) and 0 < steps.abs().max() <= 6


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(data, script):
    torchrun = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0',
                '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', str(REPOSITORY / 'train.py')]
    for name, arguments in (('encoder', PLAIN_ENCODER), ('decoder', []), ('experts', EXPERTS)):
        script(train, *SMALL, *arguments, f'--out_dir={name}1')
        run = shell(*torchrun, *SMALL, *arguments, '--micro_batch_size=2', f'--out_dir={name}2')
        assert run.returncode == 0, run.stderr
        assert ', 2 processes x 2 micro-batches x 2 sequences of 32 tokens' in run.stdout
        one, two = metrics(f'{name}1'), metrics(f'{name}2')
        assert len(one) == len(two) == 9
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            assert a.pop('expert_shares', None) == b.pop('expert_shares', None)
            for key in a.keys() - set(TIMES):
                assert math.isclose(a[key], b[key], rel_tol=2e-5), key


@pytest.mark.slow
def test_compiled_gives_the_same_losses(data, script):
    for name, compile in (('plain', False), ('compiled', True)):
        script(train, *SMALL, *PLAIN_ENCODER, f'--compile={compile}', f'--out_dir={name}',
               '--n_layer=1', '--eval_iters=1', '--max_iters=2')
    for a, b in zip(metrics('plain'), metrics('compiled')):
        for key in a.keys() - set(TIMES):
            assert math.isclose(a[key], b[key], rel_tol=1e-4), key


@pytest.mark.parametrize('found', [1, None])
def test_checkpoints_of_other_versions_are_refused(runs, script, found):
    assert json.loads(Path('decoder/run.json').read_text())['format'] == run.FORMAT
    for path in (Path('decoder/ckpt.pt'), Path('decoder/ckpt_best.pt')):
        state = load_checkpoint(path)
        del state['format']
        torch.save(state | (dict(format=found) if found else {}), path)
    message = rf'not written by this version \(format {found}, not {run.FORMAT}\)'
    for command in ([RESUME, '--out_dir=decoder'], ['--init_from=decoder', '--out_dir=new']):
        with pytest.raises(UserError, match=message):
            script(train, *SMALL, *command)
    with pytest.raises(UserError, match=message):
        load_run('decoder')


def test_scratch_moves_an_earlier_run_aside(runs, script, capsys):
    for steps in (1, 2, 3):  # within one second
        script(train, *SMALL, f'--max_iters={steps}')
    moved = sorted(path for path in Path().iterdir() if path.name.startswith('run-2'))
    assert {load_checkpoint(path / 'ckpt.pt')['step'] for path in moved} == {1, 2}
    assert load_checkpoint('run/ckpt.pt')['step'] == 3
    out = capsys.readouterr().out
    assert all(f'run holds an earlier run: renamed to {path.name}' in out for path in moved)


def test_either_checkpoint_is_an_earlier_run_and_a_link_is_followed(runs, script):
    Path('decoder/ckpt.pt').unlink()
    best = Path('decoder/ckpt_best.pt').read_bytes()
    Path('link').symlink_to('decoder')
    script(train, *SMALL, '--max_iters=1', '--out_dir=link')
    aside, = Path().glob('decoder-2*')
    assert (aside / 'ckpt_best.pt').read_bytes() == best and Path('link').is_symlink()
    assert load_checkpoint('decoder/ckpt.pt')['step'] == 1


@pytest.mark.parametrize('name', ['notes.txt', 'config.json', '.git', 'model.safetensors'])
def test_what_no_run_wrote_is_left_alone(data, script, name):
    Path('run').mkdir()
    Path('run', name).write_text('mine')
    for arguments in ([], ['--init_from=auto'], ['--out_dir=.']):
        with pytest.raises(UserError, match='which no run wrote'):
            script(train, *SMALL, *arguments)
    assert Path('run', name).read_text() == 'mine' and not Path('data').exists()


def test_a_folder_is_one_process_s(runs, script):
    holder = run.claim(Path('decoder'))
    before = {path.name: path.read_bytes() for path in Path('decoder').iterdir()}
    Path('dev.tsv').write_text('sentence\tlabel\n' + 'good\t1\n' * 20)
    shutil.copy('dev.tsv', 'train.tsv')
    for module, arguments in ((train, SMALL), (train, [RESUME, '--max_iters=8']),
                              (finetune_sst2, ['--data_dir=.', '--device=cpu', '--epochs=1'])):
        with pytest.raises(UserError, match='decoder: another process works there'):
            script(module, *arguments, '--out_dir=decoder')
    assert {path.name: path.read_bytes() for path in Path('decoder').iterdir()} == before
    holder.close()
    script(train, RESUME, '--max_iters=8', '--out_dir=decoder')


def test_a_finished_run_releases_its_folder(runs, script, monkeypatch):
    kept = []  # plotting may leave a cycle of references behind, which keeps the Run alive
    monkeypatch.setattr(run, 'plot_losses', lambda *_: kept.append(sys._getframe(1)))
    script(train, *SMALL)
    run.claim(Path('run')).close()


def test_a_login_that_is_missing_is_said_before_anything_is_written(runs, script, monkeypatch):
    def login():
        raise ValueError('No API key configured')

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(login=login))
    before = sorted(runs.rglob('*'))
    for module in (train, finetune_sst2):
        with pytest.raises(UserError, match='--wandb=True: No API key configured: log in with'):
            script(module, '--out_dir=decoder', '--wandb=True', *(SMALL[:-2] if module is train
                                                                  else ['--device=cpu']))
    assert sorted(runs.rglob('*')) == before


@pytest.mark.parametrize('place, key, value', [
    ([], 'model', None), ([], 'step', 'x'), ([], 'best', math.nan), ([], 'options', [1]),
    ([], 'provenance', 'x'), ([], 'seconds', None), ([], 'optimizers', [1]), ([], 'optimizers', []),
    (['options'], 'arch', 'x'), (['options'], 'n_layer', 'x'), (['options'], 'max_iters', None),
    (['options'], 'learning_rate', math.nan), (['provenance'], 'data_sha256', 3),
    (['optimizers', 0], 'state', 'x'), (['optimizers', 0, 'state', 0], 'exp_avg', 'x')])
def test_an_edited_checkpoint_is_one_line(runs, script, place, key, value):
    state = content = load_checkpoint('decoder/ckpt.pt')
    for name in place:
        content = content[name]
    content[key] = value
    save_checkpoint(Path('decoder/ckpt.pt'), state)
    with pytest.raises(UserError):
        script(train, RESUME, '--out_dir=decoder', '--max_iters=8')


@pytest.mark.parametrize('key, value', [('step', 'x'), ('val_loss', 'x'), ('tokens', None)])
def test_an_edited_log_is_one_line(runs, script, key, value):
    lines = metrics('decoder')
    lines[0][key] = value
    Path('decoder/metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=f'metrics.jsonl, line 1: damaged .{key}='):
        script(train, RESUME, '--out_dir=decoder', '--max_iters=8')


def test_starting_from_another_run(runs, script):
    script(train, '--init_from=decoder', '--out_dir=second', '--eval_iters=2', '--batch_size=8',
           '--max_iters=1')
    best = min(line['val_loss'] for line in metrics('decoder') if 'val_loss' in line)
    # the second run takes the model, the data and the weights of the first, but not its recipe
    assert math.isclose(metrics('second')[0]['val_loss'], best, rel_tol=1e-5)
    assert json.loads(Path('second/config.json').read_text())['warmup_iters'] is None


HEAL = ['--init_from=mla', '--o_latent=8', r'--train_only=\.o_proj\.', '--batch_size=8',
        '--eval_iters=2', '--eval_interval=2', '--warmup_iters=1']


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('weights', ['float32', 'bfloat16'])
def test_a_part_is_trained_and_the_rest_stays_as_it_was(runs, script, weights, optimizer):
    arguments = [*HEAL, f'--weights={weights}', f'--optimizer={optimizer}']
    before = load_checkpoint('mla/ckpt_best.pt')['model']
    script(train, *arguments, '--max_iters=4', '--out_dir=straight')
    state = load_checkpoint('straight/ckpt.pt')
    for name, weight in state['model'].items():
        if '.o_proj.' in name:
            assert weight.dtype == torch.float32 and name not in before
        else:
            is_matrix = weight.dim() > 1
            assert weight.dtype == (getattr(torch, weights) if is_matrix else torch.float32)
            assert torch.equal(weight, before[name].to(weight.dtype)), name
    n_moments = sum(len(optimizer['state']) for optimizer in state['optimizers'])
    assert n_moments == 2 * 2  # two layers, two matrices each
    trained = state['model']['blocks.0.attn.o_proj.o_b_proj.weight']
    script(train, *arguments, '--max_iters=2', '--lr_decay_iters=4', '--out_dir=parts')
    assert not torch.equal(trained, load_checkpoint('parts/ckpt.pt')['model'][
        'blocks.0.attn.o_proj.o_b_proj.weight'])
    script(train, RESUME, '--out_dir=parts', '--max_iters=4')
    same_state('straight/ckpt.pt', 'parts/ckpt.pt')


@pytest.mark.parametrize('name', ['mla', 'encoder'])
def test_a_score_in_bfloat16_weights_is_that_of_float32(runs, script, capsys, name):
    # a run whose weights are bfloat16 numbers
    script(train, *SMALL, f'--init_from={name}', '--out_dir=rounded', '--train_only=norm',
           '--weights=bfloat16', '--dtype=bfloat16', '--max_iters=1')
    lines = []
    for weights in ('float32', 'bfloat16'):
        capsys.readouterr()
        script(train, '--init_from=rounded', '--eval_only=True', '--dtype=bfloat16',
               f'--weights={weights}')
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and 'loss' in lines[0]


@pytest.mark.slow
def test_a_run_goes_on_with_an_output_latent(data, script, capsys):
    mla = ['--attention=mla', '--kv_latent=8', '--max_iters=20', '--learning_rate=1e-2']
    script(train, *SMALL, *mla, '--out_dir=dense')
    before = metrics('dense')[-1]['val_loss']
    for rank, worse in ((32, 1e-4), (2, 1.0)):
        script(train, '--init_from=dense', f'--o_latent={rank}', f'--out_dir=rank{rank}',
               '--eval_iters=2', '--batch_size=8', '--max_iters=1')
        assert before - 1e-4 < metrics(f'rank{rank}')[0]['val_loss'] < before + worse
        assert load_checkpoint(f'rank{rank}/ckpt.pt')['options']['o_latent'] == rank
    script(train, '--init_from=rank2', '--eval_only=True')  # is a run like any other
    script(train, '--init_from=dense', '--o_latent=32', '--o_latent_init=xavier', '--out_dir=new',
           '--eval_iters=2', '--batch_size=8', '--max_iters=1')
    assert metrics('new')[0]['val_loss'] > before + 0.01  # at full rank svd changes nothing
    refused = (
        (['--init_from=dense', '--o_latent=33'],
         'an output latent of 33: blocks.0.attn.o_proj takes 1 to 32'),
        (['--init_from=resume', '--out_dir=dense', '--o_latent=8'], 'another architecture'),
    )
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            script(train, *arguments)


@pytest.mark.parametrize('causal', [True, False])
def test_an_output_latent_is_cut_with_the_first_training_data(data, script, monkeypatch, causal):
    script(train, *SMALL, f'--causal={causal}', '--max_iters=1', '--dropout=0.1')
    models = []
    monkeypatch.setattr(train, 'train', lambda options, model, *rest: models.append(model))
    monkeypatch.setattr(train, 'CUT_TOKENS', 1000)
    for init in ('data', 'data', 'svd'):
        script(train, '--init_from=run', '--o_latent=4', f'--o_latent_init={init}',
               '--out_dir=cut', '--batch_size=4', '--device=cpu')
    states = [model.state_dict().values() for model in models]
    assert all(map(torch.equal, *states[:2]))
    folder, = Path('data').iterdir()
    loader = Loader(prepare.read_tokens(folder, 'train'), 32, BYTES, causal, seed=1337)
    batches = [loader.batch(range(16)), loader.batch(range(16, 32))]  # 1024 tokens
    wanted = add_output_latent(load_run('run')[0], 4, 'data', batches=batches)
    for blocks in zip(models[0].blocks, wanted.blocks, models[2].blocks):
        cut, direct, plain = (o_proj.o_b_proj.weight @ o_proj.o_a_proj.weight
                              for o_proj in (block.attn.o_proj for block in blocks))
        assert torch.allclose(cut, direct, atol=1e-6)
        assert not torch.allclose(cut, plain, atol=1e-3)
    with pytest.raises(UserError, match='an output latent of 33: blocks.0.attn.o_proj takes 1 to'):
        script(train, '--init_from=run', '--o_latent=33', '--o_latent_init=data', '--out_dir=cut')


def test_max_seconds_ends_the_run_and_its_schedule(data, script, monkeypatch):
    readings = itertools.count()  # a clock that goes on by a hundredth of a second a look
    monkeypatch.setattr(train.time, 'perf_counter', lambda: next(readings) / 100)
    script(train, *SMALL, '--max_iters=100000', '--max_seconds=1.5', '--eval_interval=100000',
           '--schedule=linear')
    lines = [line for line in metrics() if 'lr' in line]
    highest = max(line['lr'] for line in lines)
    assert 1.2 < lines[-1]['seconds'] < 3 and lines[-1]['lr'] < 0.2 * highest
    assert metrics()[-1]['step'] == lines[-1]['step']


def test_compiling_is_no_training_time_and_changes_nothing(data, script, monkeypatch):
    class Compiled(torch.nn.Module):
        """Takes 1,000 seconds of a clock to compile, with gradients and without, and one to run."""

        def __init__(self, model):
            super().__init__()
            self.model, self.forms = model, set()

        def forward(self, *batch):
            nonlocal now
            now += 1 if torch.is_grad_enabled() in self.forms else 1000
            self.forms.add(torch.is_grad_enabled())
            return self.model(*batch)

    now, options = 0, [*SMALL, '--max_iters=100', '--optimizer=muon', '--dropout=0.1']
    monkeypatch.setattr(train.time, 'perf_counter', lambda: now)
    monkeypatch.setattr(train, 'compiled', lambda options, model, device: Compiled(model))
    script(train, *options, '--max_seconds=6', '--schedule=wsd', '--out_dir=timed')
    assert [line['seconds'] for line in metrics('timed') if 'lr' in line] == [1, 2, 3, 4, 5, 6]
    script(train, *SMALL, *options[-2:], '--out_dir=compiled')
    monkeypatch.undo()
    monkeypatch.chdir(data)
    script(train, *SMALL, *options[-2:])
    same_state('run/ckpt.pt', 'compiled/ckpt.pt')


@pytest.mark.parametrize('poisoned_step', [6, 8])
def test_a_loss_that_is_not_finite_stops_the_run(runs, script, monkeypatch, poisoned_step):
    """The last whole checkpoint stays, whatever is due first: a line or an evaluation."""
    real = train.train_step

    def poisoned(runner, optimizers, data, step, *rest):
        if step == poisoned_step:
            next(runner.parameters()).data[0, 0] = math.nan
        return real(runner, optimizers, data, step, *rest)

    monkeypatch.setattr(train, 'train_step', poisoned)
    with pytest.raises(SystemExit) as exit:
        script(train, RESUME, '--out_dir=decoder', '--max_iters=20', '--eval_interval=2',
               f'--log_interval={1000 if poisoned_step == 6 else 1}')
    assert 'not finite' in exit.value.code  # a text, which python prints before it exits with 1
    state = load_checkpoint('decoder/ckpt.pt')
    assert state['step'] == poisoned_step
    assert all(weight.isfinite().all() for weight in state['model'].values())


def test_a_run_scores_other_data_in_its_own_tokens(data, script, capsys):
    bpe = ([word for word in SMALL if 'tokenizer' not in word]
           + ['--vocab_size=300', '--max_iters=20'])
    script(train, *bpe, '--learning_rate=1e-2')
    rows = '\n'.join(f'"{text.strip()}"' for text in corpus(99, seed=5))
    (data / 'other.csv').write_text('text\n' + rows + '\n')
    capsys.readouterr()
    script(train, '--init_from=run', '--eval_only=True', '--dataset=text', '--source=corpus.csv')
    own = capsys.readouterr().out
    shutil.move('data/text-bpe300', 'data/elsewhere')
    script(train, '--init_from=run', '--eval_only=True', '--dataset=text', '--source=other.csv')
    other = capsys.readouterr().out
    assert 'sequences of data/text-bpe300: loss' in own and 'step 20 of run' in own
    folder = next(Path('data').glob('text-bpe300-*'))
    assert f'sequences of {folder}: loss' in other
    tokenizer = Tokenizer.load('run/tokenizer.json')
    text = tokenizer.decode(prepare.read_tokens(folder, 'train'))
    written = ''.join(corpus(99, seed=5)).replace('\n', '')
    assert all(part in written for part in text.split('<|endoftext|>')[1:5])
    losses = [float(out.split('loss ')[1].split(',')[0]) for out in (own, other)]
    assert abs(losses[0] - losses[1]) < 0.5  # the same language in the same tokens


def test_what_may_change_on_resuming(runs, script):
    command = [*SMALL, RESUME, '--out_dir=decoder']
    script(train, *command, '--max_iters=7', '--weight_decay=0.25', '--beta2=0.5')
    group = load_checkpoint('decoder/ckpt.pt')['optimizers'][0]['param_groups'][0]
    assert group['weight_decay'] == 0.25 and group['betas'] == (0.9, 0.5)
    for change in ('--batch_size=4', '--seed=2', '--optimizer=muon', '--lowercase=True'):
        with pytest.raises(UserError, match='cannot go on with'):
            script(train, *command, change)


def test_other_data_are_not_the_same_run(runs, script):
    shutil.rmtree('data')
    Path('corpus.csv').write_text('text\n' + 'another text\n' * 100)
    with pytest.raises(UserError, match='decoder: was trained on other data than data/text-byte'):
        script(train, RESUME, '--out_dir=decoder')


def test_dropout_is_a_function_of_seed_step_and_rank():
    class Runner(torch.nn.Linear):
        def forward(self, x):
            return {'loss': super().forward(x).sum()}

    drawn = {}
    for seed, step, rank in itertools.product((1, 2, 2 ** 40), (0, 1), (0, 1)):
        def batch(numbers):
            draws.append(torch.rand(4))
            return [torch.ones(1, 4)]

        draws, data, options = [], SimpleNamespace(batch=batch), TrainOptions(seed=seed)
        for _ in range(2):
            train.train_step(Runner(4, 1), [], data, step, options, process(rank), 1, 1)
        assert torch.equal(*draws)
        drawn[seed, step, rank] = tuple(draws[0].tolist())
    assert len(set(drawn.values())) == len(drawn) == 12


def test_dry_run_needs_no_data(workspace, script, capsys):
    script(train, REPOSITORY / 'config/mla_o.py', '--dry_run=True')
    assert '13,090,368 parameters (13,090,368 without' in capsys.readouterr().out
    script(train, REPOSITORY / 'config/decoder.py', '--dry_run=True')
    assert '(16,036,800 without positions' in capsys.readouterr().out
    assert not list(workspace.iterdir())


def test_wandb_offline(data, script):
    script(train, *SMALL, '--max_iters=2', '--wandb=True')
    run_id = json.loads(Path('run/run.json').read_text())['wandb_id']
    assert list(Path('run/wandb').glob(f'offline-run-*-{run_id}/run-{run_id}.wandb'))


def test_a_resumed_run_goes_on_in_its_wandb_run(data, script, monkeypatch):
    asked = []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(id='abc', log=lambda *line, **step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, login=lambda: True))
    script(train, *SMALL, '--max_iters=2', '--wandb=True')
    script(train, *SMALL, RESUME, '--wandb=True')
    new, resumed = asked
    assert (new['id'], resumed['id'], resumed['resume']) == (None, 'abc', 'allow')
    assert new['project'] == 'causal-pretrain' and new['config']['parameters'] > 0


def test_the_training_split_is_scored_in_evaluation_mode(runs):
    model, tokenizer, _ = load_run('encoder')
    loader = Loader(prepare.read_tokens('data/text-byte', 'train'), 32, tokenizer,
                    causal=False, fixed=16)
    with torch.no_grad():
        loss = model(*loader.batch(np.arange(16)))['loss'].item()
    best = min((line for line in metrics('encoder') if 'val_loss' in line and line['step']),
               key=lambda line: line['val_loss'])
    assert math.isclose(best['train_eval_loss'], loss, rel_tol=1e-5)


def test_weights_that_are_not_finite_are_refused(runs):
    state = load_checkpoint('mla/ckpt_best.pt')
    state['model']['norm.weight'][3] = math.nan
    save_checkpoint(Path('mla/ckpt_best.pt'), state)
    with pytest.raises(UserError, match='norm.weight holds numbers that are not finite'):
        load_run('mla')


# -- device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('faster', [True, False])
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(monkeypatch, faster):
    monkeypatch.setattr(run, 'bfloat16_is_faster', lambda: faster)
    options = DeviceOptions(device='cpu')
    assert run.Device(options).bf16 is faster
    assert not run.Device(options, trains=False).bf16
    assert not run.Device(DeviceOptions(device='cpu', dtype='float32')).bf16
    assert run.Device(DeviceOptions(device='cpu', dtype='bfloat16'), trains=False).bf16


@pytest.mark.parametrize('found, faster', [
    ({'avx2': True}, False), ({'avx512_bf16': True}, True), ({'amx_bf16': True}, True)])
def test_what_faster_means(monkeypatch, found, faster):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: found)
    assert bfloat16_is_faster() is faster


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_one_line(data):
    environment = os.environ | dict(CXX='/nowhere/g++', TORCHINDUCTOR_CACHE_DIR=str(data))
    run = shell(REPOSITORY / 'train.py', *SMALL, '--compile=True', env=environment)
    assert run.returncode == 2 and run.stderr.count('\n') == 1, run.stderr
    assert '/nowhere/g++' in run.stderr and 'use --compile=False' in run.stderr


@pytest.mark.parametrize('environment', [
    'RANK=1', 'WORLD_SIZE=2', 'LOCAL_RANK=0', 'RANK=0 WORLD_SIZE=1', 'RANK=x LOCAL_RANK=0 '
    'WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1', 'RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a '
    'MASTER_PORT=1'])
def test_half_an_environment_of_torchrun_is_refused(workspace, script, monkeypatch, environment):
    for setting in environment.split():
        monkeypatch.setenv(*setting.split('='))
    with pytest.raises(UserError, match=f'has {environment}, which is .* unset RANK|WORLD|LOCAL'):
        script(train, *SMALL)
    assert not list(workspace.iterdir())


def test_modules_of_one_s_own_do_not_hide_ours(workspace):
    for name in ('config', 'model', 'run'):
        Path(f'{name}.py').write_text('mine = True')
    found = shell('-m', 'train', '--dry_run=True', '--vocab_size=300',
                  env=os.environ | dict(PYTHONPATH=str(REPOSITORY)))
    assert found.returncode == 0 and 'parameters' in found.stdout


# -- refusals --------------------------------------------------------------------------------------


def test_help_shows_what_a_config_sets(script, capsys):
    with pytest.raises(SystemExit):
        script(train, REPOSITORY / 'config/grouped.py', '--batch_size=4', '--help')
    out = capsys.readouterr().out
    assert '* --batch_size=4 ' in out and '* --widths=(64, 128, 256) ' in out
    assert '  --merge=softmax ' in out
    assert '--n_embd=' not in out and '--cross_n_head=' not in out and '--n_dense=' not in out


@pytest.mark.parametrize('arguments, message', [
    (['--n_layr=2'], 'did you mean n_layer?'),
    (['--batch_size=0'], 'batch_size=0: must be an integer >= 1'),
    (['--learning_rate=-1.0'], 'learning_rate=-1.0: must be a number > 0'),
    (['--max_seconds=1e999'], 'max_seconds=inf: must be a number > 0'),
    (['--beta2=1.0'], 'beta2=1.0: must be a number >= 0 and < 1'),
    (['--gradient_accumulation_steps=4'], 'set micro_batch_size'),
    (['--wandb_log=True'], 'did you mean wandb?'),
    (['--arch=rnn'], "arch='rnn'"),
    (['--block_size=100000'],
     'block_size=100000: longer than the data, data/text-byte/train.bin has only'),
    (['--learning_rate=1e-5', '--min_lr=1e-4'], 'min_lr=0.0001: above learning_rate=1e-05'),
    (['--lr_decay_iters=2'], 'lr_decay_iters=2: not after the warmup, which takes 2 steps'),
    (['--batch_size=8', '--out_dir=.'], 'which no run wrote'),
    (['--vocab_size=100'], 'vocab_size=100: the tokenizer of data/text-byte needs 257'),
    (['--n_embd=33'], 'not divisible by n_head'),
    (['--rope_dims=3'], 'rope_dims=3'),
    (['--kv_latent=3'], 'kv_latent=3 belongs to attention=mla'),
    (['--source=decoder/metrics.jsonl'], 'was prepared from corpus.csv, not decoder/metrics.jsonl'),
    (['--source=corpus*'], 'was prepared from corpus.csv, not corpus*'),
    (['--source=absent.csv'], '--source=absent.csv: no file to train on'),
    (['--init_from=resume', '--out_dir=nothere'], 'nothere/ckpt.pt: there is no such checkpoint'),
    (['--init_from=nothere'], 'nothere/ckpt.pt: there is no such checkpoint'),
    (['--init_from=decoder', '--n_embd=64'],
     'another architecture: it was trained with n_embd=32, not 64'),
    (['--init_from=resume', '--out_dir=decoder', '--n_layer=3'],
     'another architecture: it was trained with n_layer=2, not 3'),
    (['--init_from=decoder', '--causal=False'],
     'another architecture: it was trained with causal=True, not False'),
    (['--init_from=decoder', '--block_size=16'], 'size mismatch for pos_emb.weight'),
    (['--eval_only=True'], '--init_from=RUN'),
    (['--eval_only=True', '--export=new'], 'eval_only and export: one at a time'),
    (['--train_only=o_porj'], "train_only='o_porj': matches the name of no parameter"),
    (['--train_only=('], "train_only='(': no regular expression"),
    (['--init_from=resume', '--out_dir=decoder', '--train_only=norm'],
     'cannot go on with train_only=norm, it was None'),
    (['--weights=bfloat16', '--train_only=norm'], 'weights=bfloat16: computes in bfloat16 too'),
    (['--weights=bfloat16', '--dtype=auto'], 'set train_only or eval_only'),
    (['--device=tpu'], '--device=tpu'),
    (['--device=hpu'], '--device=hpu'),
    (['--device=meta'], '--device=meta: '),
    (['--out_dir=a\0b'], "out_dir='a\\x00b': must be UTF-8 text"),
    (['--source=\udcff'], "source='\\udcff': must be UTF-8 text"),
    ([f'--seed={2 ** 64}'], f'seed={2 ** 64}: '),
    (['--learning_rate=1' + '0' * 400], 'must be a number > 0'),
    ([f'--block_size={10 ** 12}'], 'longer than the data'),
])
def test_refusals(runs, script, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob('*')}
    with pytest.raises(UserError) as error:
        script(train, *SMALL, *arguments)
    assert message in str(error.value)
    after = {path: path.stat().st_mtime_ns for path in runs.rglob('*')}
    assert after == before  # nothing half-written


def test_export_refuses_torchrun(runs, script, monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR='localhost',
                            MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match='start it with python'):
        script(train, '--init_from=decoder', '--export=new')


def test_a_folder_that_cannot_be_made_is_named(runs, script):
    with pytest.raises(UserError, match='corpus.csv/run: cannot be made'):
        script(train, *SMALL, '--out_dir=corpus.csv/run')


def test_damaged_checkpoints_are_refused(runs, script):
    path = Path('decoder/ckpt.pt')
    raw = path.read_bytes()
    for damaged in (raw[:len(raw) // 2], raw[:100], b'',
                    raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='decoder/ckpt.pt: damaged, or no checkpoint'):
            script(train, RESUME, '--out_dir=decoder')


def test_a_checkpoint_cannot_run_code(runs, script):
    class Payload:
        def __reduce__(self):
            return Path.touch, (Path('owned'),)

    for content, message in ((dict(model=Payload(), format=run.FORMAT), 'no checkpoint of train'),
                             (dict(weights=torch.ones(2)), 'not written by this version'),
                             (torch.ones(2), 'not written by this version')):
        torch.save(content, 'decoder/ckpt.pt')
        with pytest.raises(UserError, match=message):
            script(train, RESUME, '--out_dir=decoder')
    assert not Path('owned').exists()


def test_a_source_that_has_changed_is_said(data, script, capsys):
    message = 'data/text-byte: corpus.csv has changed since it was prepared'
    script(train, *SMALL, '--max_iters=1')
    assert message not in capsys.readouterr().err
    with open('corpus.csv', 'a') as file:
        file.write('"one more"\n')
    script(train, *SMALL, '--max_iters=1')
    assert message in capsys.readouterr().err


# -- configs and tables ----------------------------------------------------------------------------

CONFIGS = sorted(path for path in (REPOSITORY / 'config').glob('*.py') if path.stem != '__init__')
SHRUNK = ['--dataset=text', '--source=corpus.csv', '--vocab_size=300', '--n_layer=2',
          '--batch_size=2', '--block_size=24', '--micro_batch_size=1', '--max_iters=1',
          '--eval_iters=1', '--tokenizer=bpe', '--wandb=False']


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_a_step(data, script, path):
    assert path.read_text().startswith('"""')
    more = {'grouped': ['--block_size=96'], 'v4': ['--layer_kinds=csa hca', '--hca_group=8']}
    script(train, path, *SHRUNK, *(option for name, options in more.items() if name in path.stem
                                   for option in options))
    assert metrics(f'out/{path.stem}')[-1]['step'] == 1


def decoders(prefix):
    """{name: model on the meta device} of the decoders whose configs start with the prefix."""
    models = {}
    for path in CONFIGS:
        if path.stem.startswith(prefix):
            values, name = config.load([str(path)], *train.option_classes({}))
            with torch.device('meta'):
                models[name] = make_model('transformer', **train.split_options(values)[1])
    return models


def test_the_zoo_has_one_size_and_many_caches():
    sizes, caches = {}, {}
    for name, model in decoders('zoo').items():
        embedding = model.tok_emb.weight.numel()
        sizes[name], caches[name] = model.n_params() - embedding, cache_bytes(model)[0]
    assert len(sizes) == 19 and max(sizes.values()) < 1.001 * min(sizes.values())
    assert caches['zoo'] == 8 * caches['zoo_mqa'] == max(caches.values())
    alike = 'zoo_mla', 'zoo_mla_per_head', 'zoo_gta', 'zoo_gla', 'zoo_mlra'
    assert len({caches[name] for name in alike}) == 1


def test_the_gpt2_configs_have_one_size():
    models = decoders('gpt2')
    sizes = {name: model.n_params() for name, model in models.items()}
    assert sizes == dict(gpt2=124_373_760, gpt2_mla=124_478_208, gpt2_mla_o=124_478_208)
    for path in CONFIGS:
        assert path.stem not in sizes or f'Parameters: {sizes[path.stem]:,}' in path.read_text()
    full, cut = (models[name].config.options().items() for name in ('gpt2_mla', 'gpt2_mla_o'))
    assert dict(cut - full) == dict(o_latent=256, mlp_hidden=3712)


def test_count_table_is_its_definition(runs):
    """The baseline of the README, against counts in dictionaries. Its guess is the most frequent
    token between the same two neighbours; if there is none, after the same left one, else before
    the same right one, else of all tokens."""
    import collections
    from count_table import count_table_accuracy, unigram_loss
    folder = Path('data/text-byte')
    tokens = prepare.read_tokens(folder, 'train').tolist()
    tables = [collections.defaultdict(collections.Counter) for _ in range(3)]
    for left, token, right in zip(tokens, tokens[1:], tokens[2:]):
        for table, key in zip(tables, ((left, right), left, right)):
            table[key][token] += 1
    loader = Loader(prepare.read_tokens(folder, 'val'), 32, BYTES, causal=False, fixed=0)
    right_guesses = total = 0
    for row, answers, places in zip(*loader.batch(np.arange(loader.fixed))):
        row = [None, *row.tolist(), None]
        for answer, place in zip(answers.tolist(), places.tolist()):
            keys = (row[place], row[place + 2]), row[place], row[place + 2]
            counts = next((table[key] for table, key in zip(tables, keys) if key in table),
                          collections.Counter(tokens))
            best = max(counts.values())
            guess = min(token for token, count in counts.items() if count == best)
            right_guesses += answer == guess
            total += 1
    accuracy, _, n = count_table_accuracy(folder, 32)
    assert n == total and math.isclose(accuracy, right_guesses / total)
    frequency = collections.Counter(tokens)
    val = prepare.read_tokens(folder, 'val').tolist()
    plain = [-math.log((frequency[token] + 1) / (len(tokens) + 259)) for token in val]
    assert math.isclose(unigram_loss(folder, 259), sum(plain) / len(plain), rel_tol=1e-9)
