"""The README's commands are taken from it and run in a copy of the repository, and its walkthrough
is followed there."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, corpus, shell, write_corpus
from model import BlockConfig, make_attention

README = (REPOSITORY / 'README.md').read_text()
BLOCKS = {language: re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)
          for language in ('bash', 'python')}
COMMANDS = [line.split('  #')[0].strip() for block in BLOCKS['bash'] for line in block.splitlines()]
CUT_SHORT = ['--max_iters=2', '--eval_iters=1', '--batch_size=4']
# a local corpus in place of the README's data, which is on the hub
NO_HUB = ['--dataset=text', '--source=corpus.csv', '--vocab_size=300', '--n_layer=2']


@pytest.fixture
def copy(workspace):
    """A copy of the repository, as a clone is, with a small corpus in place of the hub's data."""
    for source in REPOSITORY.glob('*.py'):
        shutil.copy(source, workspace)
    shutil.copytree(REPOSITORY / 'config', workspace / 'config')
    write_corpus(workspace, 200)
    (workspace / 'input.txt').write_text(''.join(corpus(20)))
    return workspace


@pytest.fixture
def here(copy, script, capsys):
    """here(command) runs `python SCRIPT ...` in this process: starting another takes seconds."""
    def call(command, *more):
        python, name, *arguments = shlex.split(command)
        assert python == 'python' and (copy / name).is_file()
        capsys.readouterr()
        script(importlib.import_module(name.removesuffix('.py')), *arguments, *more)
        return capsys.readouterr().out
    return call


def run(command, *more):
    """Runs a command as a process of its own, on the copy's code."""
    words = shlex.split(command)
    if words[0] == 'torchrun':
        words = ['-m', 'torch.distributed.run', '--rdzv_backend=c10d',
                 '--rdzv_endpoint=localhost:0', '--nproc_per_node=2', *words[2:]]
    else:
        assert words[0] == 'python'
        words = words[1:]
    result = shell(*words, *more)
    assert result.returncode == 0, f'{command}\n{result.stdout}{result.stderr}'
    return result.stdout


@pytest.mark.slow
def test_the_first_command(copy):
    """Every command chains from this one: install, then the quick run, here for two steps."""
    install, quick = [part.strip() for part in COMMANDS[0].split('&&')]
    assert install == 'pip install -r requirements.txt'
    out = run(quick, '--max_iters=2', '--eval_iters=1')
    assert 'data/wiki10k-bpe4096 is absent: preparing it' in out and '[right guess]' in out
    loading = BLOCKS['python'][0]
    fourth = 'print(tokenizer.decode(tokenizer.encode("The river flows into")[3:4]))\n'
    (copy / 'load.py').write_text(loading + fourth)
    assert run('python load.py').splitlines()[-1] == ' into'  # the position that the README hides


def test_the_test_command():
    install, test = [part.strip() for part in COMMANDS[1].split('&&')]
    assert install == 'pip install -r requirements-dev.txt' and test == 'python -m pytest'


@pytest.mark.slow
def test_the_commands_of_the_experiments(here):
    other = 'gated', 'causal', 'decoder_mla'
    commands = [c for c in COMMANDS[2:] if 'train.py' in c and not any(word in c for word in other)]
    assert len(commands) == 6
    for command in commands:
        if command.startswith('torchrun'):
            run(command, *NO_HUB, *CUT_SHORT)
        elif '--dry_run' in command:
            assert re.search('parameters .* cache bytes a token', here(command))
        elif '--eval_only' in command:
            assert 'masked accuracy' in here(command, '--eval_iters=1')
        else:
            here(command, *NO_HUB, *CUT_SHORT)


def test_the_commands_of_generation(here, copy):
    commands = [c for c in COMMANDS if 'sample.py' in c]
    assert len(commands) == 2
    small = NO_HUB + CUT_SHORT + ['--tokenizer=bpe', '--micro_batch_size=4']
    here('python train.py config/decoder.py', *small)
    here(next(c for c in COMMANDS if '--causal=True' in c), *NO_HUB, *CUT_SHORT)
    (copy / 'prompt.txt').write_text('the river')
    for command in commands:
        assert here(command, '--max_new_tokens=5').strip()


@pytest.mark.slow
def test_the_commands_of_deepseek(here, copy):
    commands = [c for c in COMMANDS if 'decoder_mla' in c and 'bench' not in c]
    assert len(commands) == 5
    for command in commands[:3]:
        micro = [] if 'init_from' in command else ['--micro_batch_size=4']
        here(command, *NO_HUB, *CUT_SHORT, '--tokenizer=bpe', '--block_size=64', *micro)
    assert 'between heads' in here(commands[3], '--layers=0')
    assert 'for transformers' in here(commands[4])
    n_parameters = 'print(sum(p.numel() for p in again.parameters()))\n'
    (copy / 'snippet.py').write_text(BLOCKS['python'][1] + n_parameters)
    assert int(run('python snippet.py').split()[-1]) > 1000


@pytest.mark.slow
def test_the_commands_of_speed(here, monkeypatch):
    import bench
    commands = [c for c in COMMANDS if 'bench.py' in c]
    assert len(commands) == 5
    # memory_of measures in a process of its own, which takes seconds to start
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)
    assert 'decoder_mla_o' in here(commands[0], '--n_layer=1', '--vocab_size=300', '--rounds=1')
    small = ['--layer_widths=64', '--more_widths=128', '--lengths=16', '--head_dims=32']
    assert 'cheaper from width' in here(commands[1], '--rounds=1', *small)
    config, *grid = commands[2].split()[3:]  # the grid is run in tests/test_bench.py
    names = [bench.values_of(values)[0] for values in grid]
    assert Path(config).exists() and names == ['learning_rate', 'seed']
    *configs, rates, seeds = commands[4].split('#')[0].split()[3:]  # so is this one
    assert all(Path(config).exists() for config in configs)
    assert [bench.values_of(values)[0] for values in (rates, seeds)] == names


def test_the_commands_of_fine_tuning(here, copy):
    commands = [c for c in COMMANDS if 'finetune_sst2.py' in c]
    assert len(commands) == 4
    here('python train.py config/mla_o.py', *NO_HUB, *CUT_SHORT)
    (copy / 'sst2').mkdir()
    for name, n in (('train', 100), ('dev', 20)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        (copy / f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    for command in commands:
        predicting = '--predict' in command
        more = [] if predicting else ['--data_dir=sst2', '--epochs=1', '--train_examples=64']
        out = here(command, *more)
        assert ('probability of positive' if predicting else 'test accuracy') in out


def test_the_commands_of_the_data(here, copy):
    commands = [c for c in COMMANDS if 'prepare.py' in c]
    assert len(commands) == 3
    (copy / 'books').mkdir()
    shutil.copy('input.txt', 'books/a.txt')
    (copy / 'wiki').mkdir()
    (copy / 'wiki/train.txt').write_text('= One =\n\n' + (copy / 'input.txt').read_text())
    (copy / 'wiki/valid.txt').write_text('= Two =\n\nText .\n')
    for command in commands:
        here(command, *(['--source=wiki'] if 'wikitext103' in command else []),
             *(['--vocab_size=280'] if '--vocab_size' in command else []))
    assert {path.name for path in (copy / 'data').iterdir()} == {
        'wikitext103-bpe280-lower', 'text-bpe280', 'text-byte'}


@pytest.mark.slow
def test_add_your_own_attention(copy):
    attention, listing = BLOCKS['python'][2:]
    command = next(c for c in COMMANDS if 'gated' in c)
    model = (copy / 'model.py').read_text()
    old = next(line for line in model.splitlines() if line.startswith('ATTENTIONS = '))
    (copy / 'model.py').write_text(model.replace(old, f'{attention}\n\n{listing}'))
    out = run(command, *CUT_SHORT)
    assert 'step 2: loss' in out


def test_cached_numbers_at_the_sizes_of_deepseek():
    """The last column of the table of attentions, row by row."""
    rows = re.findall(r'^\| `(?:mha|mla|gta|mfa|tpa|v4)`.* ([\d,]+) \|$', README, re.MULTILINE)
    plain, mla = dict(head_dim=128, rope_dims=64), dict(attention='mla', head_dim=192, rope_dims=64)
    shared = dict(mla, rope_key='shared')
    attentions = [plain, dict(plain, n_kv_head=8), dict(mla, kv_latent=512),
                  dict(shared, kv_latent=512), dict(shared, kv_latent=256, kv_groups=2),
                  dict(shared, kv_latent=128, kv_branches=4),
                  dict(plain, attention='gta', n_kv_head=8),
                  dict(attention='mfa', q_latent=1536, head_dim=256),
                  dict(plain, attention='tpa', q_rank=6, kv_rank=2)]
    v4 = dict(attention='v4', n_embd=4096, n_head=64, head_dim=512, rope_dims=64, q_latent=1024,
              window=128, csa_group=4, hca_group=128, o_latent=1024, o_groups=8, index_topk=512,
              index_n_head=64, index_head_dim=128)
    with torch.device('meta'):
        layers = [make_attention(BlockConfig(**dict(n_embd=7168, n_head=128) | options))
                  for options in (*attentions, dict(v4, layers='csa'), dict(v4, layers='hca'))]
    assert rows == [f'{layer.cache_width():,.0f}' for layer in layers]
    assert [f'{layer.cache_fixed():,}' for layer in layers[-2:]] == re.findall(
        r'beside ([\d,]+)(?: for|\. At)', README)
    o_a_proj = layers[-1].o_proj.o_a_proj  # of one group after the other
    assert (o_a_proj.in_features, o_a_proj.out_features // 8) == (4096, 1024)


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r'[`(]([\w./]+\.(?:py|md|txt))[`)]', README):
        if name not in ('input.txt', 'prompt.txt'):
            assert (REPOSITORY / name).exists() or (REPOSITORY / 'config' / name).exists(), name
