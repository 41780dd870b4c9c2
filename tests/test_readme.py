"""What README says is true: what it names exists, its numbers follow from the code and the results,
and its commands run, in a copy of the repository."""

import functools
import glob
import importlib.util
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, corpus, shell, write_corpus
from model import ATTENTIONS, cache_bytes, make_model, n_active_params, option_names

README = (REPOSITORY / 'README.md').read_text()
BLOCKS = {language: re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)
          for language in ('bash', 'python')}
COMMANDS = [re.split('  +#', line)[0] for block in BLOCKS['bash'] for line in block.splitlines()]
CUT_SHORT = ['--max_iters=2', '--eval_iters=1', '--batch_size=4']
# a local corpus in place of the README's data, which is on the hub
NO_HUB = ['--dataset=text', '--source=corpus.csv', '--tokenizer=bpe', '--vocab_size=300',
          '--n_layer=2']


@functools.cache
def model_of(name):
    """The model of a config, on the meta device."""
    values = runpy.run_path(str(REPOSITORY / 'config' / name))
    options = {key: values[key] for key in values.keys() & option_names(values['arch'])}
    with torch.device('meta'):
        return make_model(values['arch'], **options)


# -- names and numbers -----------------------------------------------------------------------------


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)]+)\)', README):
        path, _, anchor = target.partition('#')
        if not path.startswith('https://'):
            text = (REPOSITORY / path).read_bytes().decode(errors='replace')
            headings = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
                        for heading in re.findall('^#+ (.*)', text, re.MULTILINE)]
            assert not anchor or anchor in headings, target


def test_files_exist():
    words = {word for quoted in re.findall('`([^`]+)`', README) for word in quoted.split()}
    words |= {word for command in COMMANDS for word in shlex.split(command)}
    for word in words:
        if re.fullmatch(r'[\w./*]+\.(py|md|txt)', word) and 'books' not in word:
            assert [*REPOSITORY.glob(word), *REPOSITORY.glob(f'config/{word}')], word


def test_options_exist():
    """An option is a field with a comment after it."""
    code = ''.join(path.read_text() for path in REPOSITORY.glob('*.py'))
    known = re.findall(r'^    (\w+): .+ = .+  # ', code, re.MULTILINE)
    named = re.findall(r'--(\w+)=', README) + re.findall(r"`(\w+)=[\w']+`", README)
    assert len(named) > 30 and {*named} <= {*known, 'nproc_per_node'}


def test_names_in_python_exist():
    code = ''.join(path.read_text() for path in REPOSITORY.glob('*.py'))
    code += (REPOSITORY / 'tests/test_model.py').read_text()
    for name in ('load_run', 'add_output_latent', 'aux_losses', 'linear_cross_entropy', 'body',
                 'make_optimizers', 'DATASETS', 'CAUSAL_VARIANTS', 'EVERY'):
        assert re.search(rf'`{name}\b', README), f'README names {name} no more'
        assert re.search(rf'\b{name}(\(| = |:)', code), f'{name} is not in the code'


def test_intervals_are_those_of_the_results():
    figures = re.findall(r'[\d.]+ ± [\d.]+', README)
    pages = [REPOSITORY / 'RESULTS.md', *REPOSITORY.glob('results/*.md')]
    results = ' '.join(' '.join(page.read_text() for page in pages).split())
    assert figures and all(figure in results for figure in figures)


def test_parameter_counts():
    section = README.split('## Configs')[1].split('## ')[0]
    covered = set()
    for row in re.findall(r'^\| `.*', section, re.MULTILINE):
        names = re.findall(r'`([\w*]+\.py)`', row)
        configs = {path.name for name in names for path in REPOSITORY.glob(f'config/{name}')}
        models = [model_of(name) for name in configs]
        covered |= configs
        counts = {model.n_params() for model in models}
        counts |= {n_active_params(model) for model in models}
        without_positions = {model.n_params(positions=False) for model in models}
        written = [int(number.replace(',', '')) for number in re.findall(r'\d[\d,]{6,}', row)]
        assert written and {*written} <= (without_positions if ' * ' in row else counts), row
        if 'zoo.py' in names:  # equal size within 0.1%
            assert all(abs(count / written[0] - 1) < 0.001 for count in counts)
    assert covered == {path.name for path in REPOSITORY.glob('config/*.py')} - {'__init__.py'}


def test_attentions():
    """The table's options and numbers are those of the configs, and its formulas give the numbers
    that a cache has when it is filled."""
    section, named = README.split('## Attentions')[1].split('## ')[0], set()
    rows = re.findall(r'^\| .* \| .* \| (.*) \| (.*) \| `(\w+\.py)`: (\d+)', section, re.MULTILINE)
    for options, formula, config, number in rows:
        c = model_of(config).config
        for name, value in re.findall(r"`(\w+)='(\w+)'`", options):
            assert getattr(c, name) == value
        assert all(getattr(c, name) is not None for name in re.findall(r'`(\w+)', options))
        named.add(c.attention)
        per_token, fixed = (n / 4 / c.n_layer for n in cache_bytes(model_of(config)))
        assert per_token == int(number) and (fixed > 0) == (c.attention == 'v4')
        sizes = dict(H=c.n_head, d=c.head_dim, r=c.rope_dims, L=c.kv_latent, n=c.kv_branches,
                     g=c.n_kv_head or c.kv_groups, R=c.kv_rank)
        m_of = dict(window=float('inf'), csa=c.csa_group, hca=c.hca_group)
        groups = [m_of[kind] for kind in c.layer_kinds.split()]
        product = re.sub(r'(?<=[\w)]) (?=[\w(])', ' * ', formula.split(',')[0])
        values = [eval(product, dict(sizes, m=m)) for m in groups]
        assert sum(values) / len(values) == per_token, (config, formula)
    assert len(rows) == section.count('| [') and named == ATTENTIONS.keys()


def test_cached_elements_at_the_sizes_of_deepseek():
    written = re.search(r'MHA caches ([\d,]+) and MLA ([\d,]+)', README).groups()
    sizes = dict(n_embd=7168, n_head=128, n_layer=1, vocab_size=8, block_size=4, rope_dims=64)
    mla = dict(sizes, attention='mla', head_dim=192, v_head_dim=128, kv_latent=512, q_latent=1536,
               rope_key='shared')
    with torch.device('meta'):
        models = [make_model('transformer', **options) for options in
                  (dict(sizes, head_dim=128), mla)]
    assert [f'{cache_bytes(model)[0] / 4:,.0f}' for model in models] == [*written]


# -- an attention of one's own ---------------------------------------------------------------------


@pytest.fixture
def copy(workspace):
    """A copy of the repository, as a clone is, with a small corpus in place of the hub's data."""
    for source in REPOSITORY.glob('*.py'):
        shutil.copy(source, workspace)
    for folder in ('config', 'tests'):
        shutil.copytree(REPOSITORY / folder, workspace / folder)
    write_corpus(workspace, 200)
    (workspace / 'input.txt').write_text(''.join(corpus(20)))
    return workspace


def add_attention(folder):
    attention, = BLOCKS['python']
    with open(folder / 'model.py', 'a') as file:
        file.write(f'\n\n{attention}')


def test_an_attention_of_ones_own_joins_the_others(copy):
    add_attention(copy)
    spec = importlib.util.spec_from_file_location('changed_model', copy / 'model.py')
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    assert changed.ATTENTIONS.keys() == ATTENTIONS.keys() | {'gated'}
    for config in ('decoder_v4.py', 'zoo_mla.py'):
        with torch.device('meta'):
            changed.make_model('transformer', **model_of(config).config.options())
    options, x = dict(n_embd=32, n_head=4), torch.randn(1, 5, 32)
    plain = changed.make_attention(changed.BlockConfig(**options))
    gated = changed.make_attention(changed.BlockConfig(attention='gated', **options))
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        gated.head_gate_proj.weight.zero_()  # every gate is half open
        assert torch.allclose(gated(x), plain(x) / 2, atol=1e-6)


@pytest.mark.slow
def test_an_attention_of_ones_own_is_tested_and_trained(copy):
    add_attention(copy)
    test, train = [command for command in COMMANDS if 'gated' in command]
    n_passed = int(re.search(r'(\d+) passed', run(test))[1])
    assert n_passed >= 6  # causality in training and evaluation, two cached, loss, FLOPs
    assert 'step 2: loss' in run(train, *NO_HUB, *CUT_SHORT)


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture
def here(copy, script, capsys):
    """here(command) runs `python SCRIPT ...` in this process: starting another takes seconds."""
    def call(command, *more):
        python, name, *arguments = shlex.split(command)
        assert python == 'python' and (copy / name).is_file()
        capsys.readouterr()
        paths = [path for word in arguments for path in sorted(glob.glob(word)) or [word]]
        script(importlib.import_module(name.removesuffix('.py')), *paths, *more)
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


def commands_with(*words):
    """The README's commands that have all of these words."""
    return [command for command in COMMANDS if all(word in command for word in words)]


def small_decoder(here):
    """Trains out/decoder_mla as README does, but small."""
    command, = commands_with('train.py config/decoder_mla.py')
    here(command, *NO_HUB, *CUT_SHORT, '--block_size=64')


def test_the_first_commands_install_what_they_need():
    assert [command.split(' && ') for command in COMMANDS[:2]] == [
        ['pip install -r requirements.txt', 'python train.py config/quick.py'],
        ['pip install -r requirements-dev.txt', 'python -m pytest']]


@pytest.mark.slow
def test_the_first_command(copy):
    out = run(COMMANDS[0].split(' && ')[1], '--max_iters=2', '--eval_iters=1')
    assert 'data/wiki10k-bpe4096 is absent: preparing it' in out and '[right guess]' in out


@pytest.mark.slow
def test_the_commands_of_training(here):
    commands = commands_with('train.py', 'mla_o')
    assert len(commands) == 3
    for command in commands:
        here(command, *NO_HUB, *CUT_SHORT)
    command, = commands_with('torchrun')
    out = run(command, *NO_HUB, *CUT_SHORT, '--block_size=64')
    assert '2 processes x 1 micro-batches x 2 sequences' in out
    assert 'cache bytes' in here('python train.py config/decoder_mla.py --dry_run=True')


def test_the_commands_of_sampling_and_fine_tuning(here, copy):
    small_decoder(here)
    command, = commands_with('sample.py')
    assert here(command, '--max_new_tokens=5').strip()
    (copy / 'sst2').mkdir()
    for name, n in (('train', 100), ('dev', 20)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        (copy / f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    command, = commands_with('finetune_sst2.py')
    assert 'test accuracy' in here(command, '--data_dir=sst2', '--epochs=1', '--train_examples=64')


@pytest.mark.slow
def test_the_commands_of_ranks_and_of_exports(here, copy):
    small_decoder(here)
    cut, = commands_with('--o_latent=64', 'decoder_mla')
    assert 'loss' in here(cut, '--eval_iters=1')
    ranks, = commands_with('svd.py')
    assert 'between heads' in here(ranks, '--layers=0')
    export, = commands_with('--export=out/hf')
    assert 'for transformers' in here(export)


def test_the_command_of_the_data(here, copy):
    (copy / 'books').mkdir()
    shutil.copy('input.txt', 'books/a.txt')
    command, = commands_with('prepare.py')
    here(command, '--vocab_size=280')
    assert [path.name for path in (copy / 'data').iterdir()] == ['text-bpe280']


@pytest.mark.slow
def test_the_commands_of_speed(here, monkeypatch):
    import bench
    import sweep
    # memory_of measures in a process of its own, which takes seconds to start
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)
    command, = commands_with('bench.py')
    assert 'decoder_mla_o' in here(command, '--n_layer=1', '--vocab_size=300', '--block_size=64',
                                   '--context=32', '--micro_batch_size=2', '--rounds=1')
    # tests/test_sweep.py runs a grid
    line, = commands_with('sweep.py sweep')
    _, paths, grid = sweep.read_grid('sweep', shlex.split(line)[3:])
    assert grid.keys() == {'learning_rate', 'seed'} and all(map(glob.glob, paths))
