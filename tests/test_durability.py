"""What a run must survive: kills while it saves, full disks, dead processes, wrong options."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import bench
import finetune_sst2
import prepare
import sample
import svd
import train
from config import UserError, options_of
from conftest import ENCODER, REPOSITORY, SMALL, TIMES, metrics, same_state, shell
from run import load_checkpoint, save_checkpoint


def in_a_fork(work):
    """Runs work() in a copy of this process, which ends with it; returns its process number."""
    process = os.fork()
    if process:
        return process
    try:
        # tqdm's own lock is shared with this process: a copy that is killed while it holds the
        # lock would leave it taken
        tqdm.set_lock(threading.RLock())
        work()
    finally:
        os._exit(0)


def state_of(step):
    """A checkpoint in which every number is the step. Its tensors are so small that torch takes no
    threads to make them: a fork of this process has none."""
    weights = {f'weight{i}': torch.full((100, 100), float(step)) for i in range(20)}
    return dict(model=weights, options=dict(arch='transformer'), step=step, provenance={})


@pytest.mark.parametrize('n_kills', [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_the_old_or_the_new_state(workspace, n_kills):
    path = workspace / 'ckpt.pt'
    save_checkpoint(path, state_of(0))
    rng, seen = random.Random(0), set()

    def save_forever():
        step = load_checkpoint(path)['step']
        while True:
            step += 1
            save_checkpoint(path, state_of(step))

    for _ in range(n_kills):
        process = in_a_fork(save_forever)
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        state = load_checkpoint(path)
        wanted = torch.full((100, 100), float(state['step']))
        assert all(torch.equal(weight, wanted) for weight in state['model'].values())
        seen.add(state['step'])
    assert len(seen) > n_kills // 3  # saves did happen between the kills


def limit_file_size(n_bytes):
    """From here on this process cannot write past n_bytes of a file, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint(data):
    command = [REPOSITORY / 'train.py', *SMALL, '--eval_interval=2']
    assert shell(*command, '--max_iters=2').returncode == 0
    before = {name: Path(f'run/{name}.pt').read_bytes() for name in ('ckpt', 'ckpt_best')}
    full = shell(*command, '--init_from=resume', '--max_iters=6',
                 preexec_fn=lambda: limit_file_size(20_000))
    assert full.returncode == 2 and len(full.stderr.strip().splitlines()) == 1
    assert ('run/ckpt_best.pt: cannot be written' in full.stderr  # which is saved first
            and 'what was there before is kept' in full.stderr)
    assert not list(Path('run').glob('*.partial'))
    assert all(Path(f'run/{name}.pt').read_bytes() == old for name, old in before.items())
    assert shell(*command, '--init_from=resume', '--max_iters=6').returncode == 0
    assert shell(*command, '--out_dir=straight', '--max_iters=6').returncode == 0
    same_state('straight/ckpt.pt', 'run/ckpt.pt')


@pytest.mark.slow
def test_torchrun_replaces_a_killed_process(data):
    """Of two processes one is killed after a checkpoint. The run restarts, resumes, and ends as one
    that nobody disturbed."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                '--max-restarts=2', '--master_port=0', '--rdzv_backend=c10d',
                '--rdzv_endpoint=localhost:0', str(REPOSITORY / 'train.py'), *SMALL,
                '--dropout=0.1', '--max_iters=120', '--lr_decay_iters=120', '--eval_interval=20',
                '--micro_batch_size=4', '--init_from=auto']
    # two processes of two threads each would wait for each other on two cores
    alone = os.environ | dict(OMP_NUM_THREADS='1')
    straight = subprocess.run([*torchrun, '--out_dir=straight'], capture_output=True, timeout=200,
                              env=alone)
    assert straight.returncode == 0
    run = subprocess.Popen([*torchrun, '--out_dir=run'], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, env=alone)
    while (not any('step 50/' in line for line in iter(run.stdout.readline, ''))
           and run.poll() is None):
        pass
    children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in children.stdout.split()]
    start = time.perf_counter()
    os.kill(workers[-1], signal.SIGKILL)
    out = run.communicate(timeout=200)[0]
    # the other process does not wait for the dead one
    assert run.returncode == 0 and time.perf_counter() - start < 120
    # nor does anything ask the dead process for a connection
    assert 'step 120' in out and 'refused' not in out
    same_state('straight/ckpt.pt', 'run/ckpt.pt')
    steps = [line['step'] for line in metrics('run') if 'train_loss' in line]
    assert steps == list(range(1, 121))  # no gap, and nothing twice


@pytest.mark.parametrize('kind', [[], ENCODER], ids=['decoder', 'encoder'])
def test_accumulation_changes_neither_losses_nor_sequences(runs, script, monkeypatch, kind):
    consumed, original = [], train.Prefetcher.batch
    monkeypatch.setattr(train.Prefetcher, 'batch', lambda self, numbers: (
        consumed[-1].extend(numbers), original(self, numbers))[1])
    kind = [argument for argument in kind if 'dropout' not in argument]
    for micro in (8, 4, 2):
        consumed.append([])
        script(train, *SMALL, *kind, f'--micro_batch_size={micro}', f'--out_dir=micro{micro}')
    assert consumed[0] == consumed[1] == consumed[2] == list(range(6 * 8))
    for micro in (4, 2):
        for a, b in zip(metrics('micro8'), metrics(f'micro{micro}'), strict=True):
            for key in a.keys() - set(TIMES):
                assert a[key] == pytest.approx(b[key], rel=2e-5), key


def test_a_kill_while_preparing_leaves_a_whole_data_set(workspace, script):
    """Two sources in turn, killed at random moments: what stands is one of the two, or nothing."""
    for name, word in (('a', 'some words '), ('b', 'others, longer ones ')):
        (workspace / f'{name}.txt').write_text(word * 3000)
    digests = set()
    for name in 'ab':
        script(prepare, '--dataset=text', f'--source={name}.txt', '--tokenizer=byte')
        digests.add(json.loads(Path('data/text-byte/meta.json').read_text())['sha256'])
    rng, found = random.Random(0), []

    def prepare_forever():
        for name in 'ab' * 1000:
            sys.argv = ['prepare.py', '--dataset=text', f'--source={name}.txt', '--tokenizer=byte']
            prepare.main()

    for _ in range(10):
        process = in_a_fork(prepare_forever)
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if Path('data/text-byte').exists():
            meta = prepare.read_meta(Path('data/text-byte'))
            assert meta['sha256'] in digests
            tokens = prepare.read_tokens(Path('data/text-byte'), 'train')
            assert len(tokens) == meta['train']['tokens']
            found.append(meta['sha256'])
    assert found
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')
    assert [path.name for path in Path('data').iterdir()] == ['text-byte']


@pytest.mark.slow
def test_memory_does_not_grow(data):
    """Resident memory at step 2,000 is that at step 500, within 1%."""
    watch = ('import sys, train; sys.path.insert(0, sys.argv.pop(1)); step = train.train_step\n'
             'def watched(runner, optimizers, data, n, *rest):\n'
             '    if n in (500, 1999): '
             'print("resident", open("/proc/self/statm").read().split()[1], flush=True)\n'
             '    return step(runner, optimizers, data, n, *rest)\n'
             'train.train_step = watched; train.main()')
    run = shell('-c', watch, REPOSITORY, *SMALL, '--max_iters=2000', '--log_interval=10',
                '--eval_interval=500', timeout=300,
                env=os.environ | dict(PYTHONPATH=str(REPOSITORY)))
    first, last = (int(line.split()[1]) for line in run.stdout.splitlines()
                   if line.startswith('resident'))
    assert last < 1.01 * first


# -- options ---------------------------------------------------------------------------------------

SCRIPTS = {
    train: (train.TrainOptions,),
    prepare: (prepare.PrepareOptions,),
    finetune_sst2: (finetune_sst2.FinetuneOptions,),
    sample: (sample.SampleOptions,),
    bench: (bench.BenchOptions,),
    svd: (svd.SvdOptions,),
}


def wrong_values(classes):
    """Arguments with a value of the wrong type, one out of range, and an unknown name for each
    option."""
    for name, option in ((name, option) for cls in classes
                         for name, option in options_of(cls).items()):
        if 'str' not in str(option.type) or 'Literal' in str(option.type):
            yield name, f'--{name}={{}}'
        if re.search('int|float', str(option.type)) and 'tuple' not in str(option.type):
            yield name, f'--{name}=-1'
        if 'float' in str(option.type):
            yield name, f'--{name}=1e999'
        yield f'{name}x', f'--{name}x=1'


@pytest.mark.parametrize('module', SCRIPTS, ids=lambda module: module.__name__)
def test_wrong_options_are_named(workspace, script, module):
    """The message is one line that names the option, and nothing has been written."""
    for name, argument in wrong_values(SCRIPTS[module]):
        with pytest.raises(UserError) as error:
            script(module, argument)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not list(workspace.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('script', [
    'train.py', 'prepare.py', 'finetune_sst2.py', 'sample.py', 'bench.py', 'svd.py'])
def test_a_refusal_is_one_line_and_status_2(workspace, script):
    result = shell(REPOSITORY / script, '--sed=1')
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == f'{script}: sed: there is no such option; did you mean seed?\n'


@pytest.mark.parametrize('text, message', [
    ('n_layer = "two"', 'n_layer'),
    ('n_layr = 2', 'did you mean n_layer'),
    ('n_layer = ', 'SyntaxError'),
    ('1 / 0', 'ZeroDivisionError'),
    ('n_embd = 30\nn_head = 4', 'not divisible'),
    ('attention = "mla"', 'needs kv_latent'),
    ('o_norm = "sum"', 'belongs to o_latent: set that'),
    ('causal = False\nsubtract_next_position = True', 'subtract_next_position'),
    ('from config.nowhere import *', 'ModuleNotFoundError'),
    ('arch = "rnn"', "arch='rnn'"),
])
def test_broken_and_contradictory_configs(runs, script, text, message):
    Path('mine.py').write_text(text)
    before = sorted(runs.rglob('*'))
    others = (argument for argument in SMALL if argument.split('=')[0].strip('-') not in text)
    with pytest.raises(UserError, match=message) as error:
        script(train, 'mine.py', *others)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(runs.rglob('*')) == before


@pytest.mark.parametrize('damage', ['odd', 'truncated', 'ids'])
def test_damaged_token_files_are_refused(runs, script, damage):
    path = Path('data/text-byte/train.bin')
    raw = path.read_bytes()
    damaged = {'odd': raw[:-1], 'truncated': raw[:len(raw) // 2],
               'ids': np.full(len(raw) // 2, 999, np.uint16).tobytes()}
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match='train.bin|token id 999'):
        script(train, *SMALL, '--out_dir=other')
    assert not Path('other/ckpt.pt').exists()
