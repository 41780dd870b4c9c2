"""Shared by all tests: no network, a working directory of their own, small corpora."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', WANDB_MODE='offline',
                   MPLBACKEND='Agg', OMP_NUM_THREADS='2')

import pytest


def pytest_configure(config):
    # a shell's background jobs, and all that they start, ignore Ctrl-C, which some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch.compile imports a part of torch that torch itself has deprecated
    config.addinivalue_line('filterwarnings', 'ignore:`torch.jit:DeprecationWarning')
    config.addinivalue_line(
        'markers', 'slow: left out unless asked for, `python -m pytest -m slow`')
    config.option.markexpr = config.option.markexpr or 'not slow'


REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / 'tests')]

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
    """corpus.csv: a column `text`, a document a row."""
    rows = ''.join(f'"{text.strip()}"\n' for text in corpus(n_documents))
    (folder / 'corpus.csv').write_text(f'text\n{rows}')


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
