"""Shared by all tests: no network, a working directory of their own, small corpora and runs."""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', WANDB_MODE='offline',
                   MPLBACKEND='Agg', OMP_NUM_THREADS='1')

import pytest


def pytest_configure(config):
    # a shell's background jobs, and all that they start, ignore Ctrl-C, which some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch.compile imports a part of torch that torch itself has deprecated
    config.addinivalue_line('filterwarnings', 'ignore:`torch.jit:DeprecationWarning')
    config.addinivalue_line(
        'markers', 'slow: left out unless asked for, `python -m pytest -m slow`')
    config.option.markexpr = config.option.markexpr or 'not slow'
    config.stderr = os.dup(2)  # that of a test is captured


@pytest.fixture(autouse=True)
def hang_fails(request):
    """After 15 minutes in one test, all ends with where it was."""
    faulthandler.dump_traceback_later(900, exit=True, file=request.config.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / 'tests')]

# -- corpora ---------------------------------------------------------------------------------------

WORDS = ('the river of old stone runs under a bridge where two small boats wait for rain '
         'and nobody asks why').split()


def corpus(n_documents, seed=0):
    """Documents with some structure to learn: most words follow from the two before them."""
    import random
    rng, documents = random.Random(seed), []
    for _ in range(n_documents):
        words = [rng.choice(WORDS), rng.choice(WORDS)]
        for _ in range(rng.randrange(20, 60)):
            follow = (WORDS.index(words[-1]) * 3 + WORDS.index(words[-2])) % len(WORDS)
            words.append(WORDS[follow] if rng.random() < 0.8 else rng.choice(WORDS))
        documents.append(' '.join(words) + '.\n')
    return documents


def write_corpus(folder, n_documents):
    """corpus.csv: a column `text`, one document per row."""
    rows = ''.join(f'"{text.strip()}"\n' for text in corpus(n_documents))
    (folder / 'corpus.csv').write_text(f'text\n{rows}')


# -- runs ------------------------------------------------------------------------------------------

# options of train.py for a run that takes a fraction of a second
SMALL = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32',
         '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=8', '--eval_iters=2',
         '--log_interval=1', '--warmup_iters=2', '--device=cpu', '--max_iters=6',
         '--eval_interval=3', '--out_dir=run', '--dtype=float32']  # auto differs by machine
MLA = ['--attention=mla', '--kv_latent=8', '--rope_dims=8', '--learned_positions=False']
ENCODER = ['--causal=False', *MLA, '--q_latent=16', '--o_latent=16', '--norm=rms', '--dropout=0.1',
           '--attention_dropout=0.1']
TIMES = 'seconds', 'tokens_per_second', 'memory_gb'  # in metrics.jsonl, where no two runs agree


def train_runs(folder, arguments, runs):
    """Writes corpus.csv into a folder and trains the runs {name: further arguments} there."""
    import train
    write_corpus(folder, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in runs.items():
            patch.setattr('sys.argv', ['train.py', *arguments, *options, f'--out_dir={name}'])
            train.main()
    return folder


@pytest.fixture(scope='session')
def small_runs(tmp_path_factory):
    """A folder with corpus.csv, its data and the runs `decoder`, `mla` and `encoder` of six steps.
    It is for all tests to read; the fixture `runs` is a copy."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    folder = train_runs(tmp_path_factory.mktemp('small'), SMALL,
                        dict(decoder=[], mla=MLA, encoder=ENCODER))
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    return folder


def metrics(folder='run'):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, 'metrics.jsonl').read_text().splitlines()]


def timeless(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same_state(a, b):
    """Asserts that two checkpoints have the same step, weights and optimizers, learning rates too,
    to the last bit."""
    import torch
    from run import load_checkpoint
    a, b = load_checkpoint(a), load_checkpoint(b)

    def leaves(node):
        values = (node.values() if isinstance(node, dict)
                  else node if isinstance(node, (list, tuple)) else None)
        return [node] if values is None else [leaf for value in values for leaf in leaves(value)]

    for part in ('model', 'optimizers', 'step'):
        left, right = leaves(a[part]), leaves(b[part])
        assert len(left) == len(right) > 0, part
        for x, y in zip(left, right):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, part


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def float32_on_a_cpu(monkeypatch):
    """What dtype=auto takes in this process does not depend on the machine that runs the tests."""
    import run
    monkeypatch.setattr(run, 'bfloat16_is_faster', lambda: False)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty working directory; signal handlers are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


@pytest.fixture
def data(workspace):
    """The working directory with a corpus in it."""
    write_corpus(workspace, 200)
    return workspace


@pytest.fixture
def runs(workspace, small_runs):
    """The working directory with a copy of small_runs in it."""
    shutil.copytree(small_runs, workspace, dirs_exist_ok=True)
    return workspace


@pytest.fixture
def script(monkeypatch):
    """script(module, '--key=value', ...) runs a script's main() in this process."""
    def call(module, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, arguments)])
        return module.main()
    return call


def shell(*command, timeout=120, **kwargs):
    """A command as a real process, in the current directory."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=timeout, **kwargs)
