"""The option loader: python files, --key=value, and one line for what is wrong."""

from dataclasses import dataclass
from typing import Literal

import pytest

import config
from config import UserError
from conftest import REPOSITORY, shell


@dataclass
class Options:
    """Some options"""

    name: str = 'x'  # a word
    n_layer: int = 2  # how many
    rate: float = 0.5  # how fast
    flag: bool = False  # whether
    size: int | None = None  # how large
    folder: str | None = 'data'  # where
    kind: Literal['a', 'b'] = 'a'  # which
    widths: tuple[int, ...] = (1, 2)  # how wide


def load(*argv):
    return config.load(list(argv), Options, doc='Some script.', refused={'old_name': 'use name'})


def test_overrides_are_typed_literals_split_at_the_first_equals_sign():
    values, name = load('--name=a=b', '--n_layer=3', '--rate=1', '--flag=True', '--size=None',
                        '--widths=(3, 4)')
    wanted = dict(name='a=b', n_layer=3, rate=1.0, flag=True, size=None, widths=(3, 4))
    assert values == wanted and name is None
    assert isinstance(values['rate'], float)
    assert load('--folder=None')[0] == {'folder': None} and load('--folder=7')[0] == {'folder': '7'}
    assert load('--name=2024')[0] == {'name': '2024'} and load('--rate=1e-3')[0] == {'rate': 1e-3}


def test_a_config_file_then_overrides(tmp_path):
    (tmp_path / 'base.py').write_text('"""Why."""\nimport math\n_half = 0.5\n'
                                      'rate = _half * math.sqrt(4)\nname = "base"\n')
    path = tmp_path / 'run.py'
    path.write_text(f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n'
                    'from base import *\nn_layer = 7\n')
    assert load(str(path), '--name=mine') == (dict(rate=1.0, name='mine', n_layer=7), 'run')


@pytest.mark.parametrize('argv, message', [
    (['--n_layr=3'], 'n_layr: there is no such option; did you mean n_layer?'),
    (['--n_layer=3.5'], '--n_layer=3.5: takes an int'),
    (['--n_layer=True'], '--n_layer=True: takes an int'),
    (['--n_layer='], '--n_layer=: takes an int'),
    (['--rate=fast'], '--rate=fast: takes a float'),
    (['--flag=1'], '--flag=1: takes True or False'),
    (['--flag'], '--flag: write --flag=True'),
    (['--rate'], '--rate: write --rate=VALUE'),
    (['--size=big'], '--size=big: takes an int or None'),
    (['--kind=c'], '--kind=c: takes a or b'),
    (['--widths=wide'], '--widths=wide: takes (an int, ...)'),
    (['--widths=(1, 2.5)'], 'takes (an int, ...)'),
    (['--old_name=1'], 'old_name: use name'),
    (['nothere.py'], 'nothere.py: there is no such config file'),
    (['config/mla_0.py'], 'did you mean config/mla_o.py?'),
    (['a.py', 'b.py'], 'b.py: options are written --key=value, and there can be one config file'),
])
def test_refusals(argv, message):
    with pytest.raises(UserError) as error:
        load(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize('source, message', [
    ('n_layer = = 3', 'SyntaxError'),
    ('n_layer = undefined', "NameError: name 'undefined' is not defined"),
    ('n_layer = "3"', "n_layer='3': takes an int"),
    ('n_layr = 3', 'did you mean n_layer?'),
    ('from config.nothing import *', 'ModuleNotFoundError'),
])
def test_broken_config_files(tmp_path, source, message):
    path = tmp_path / 'broken.py'
    path.write_text(source)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert message in str(error.value)


def test_running_out_of_memory_is_one_line(capsys):
    for error in (MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate 20 GiB'),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        def main():
            raise error
        with pytest.raises(SystemExit) as exit:
            config.run(main)
        assert exit.value.code == 2 and 'out of memory' in capsys.readouterr().err

    def bug():
        raise RuntimeError('shapes differ')
    with pytest.raises(RuntimeError):
        config.run(bug)


def test_what_a_config_imports_is_no_option(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text('from __future__ import annotations\nfrom math import sqrt\n'
                    'from typing import Literal\nrate = sqrt(4)\n')
    assert load(str(path))[0] == dict(rate=2.0)
    for source, message in (('rate = lambda: 3', 'rate=<function'), ('exit(0)', 'SystemExit')):
        path.write_text(source)
        with pytest.raises(UserError, match=message):
            load(str(path))


def test_help_prints_every_option_with_default_type_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit:
        load('--help')
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'Some script.' and 'Some options' in lines
    assert [' '.join(line.split()) for line in lines if line.startswith('  --')] == [
        '--name=x a word [a string]',
        '--n_layer=2 how many [an int]',
        '--rate=0.5 how fast [a float]',
        '--flag=False whether [True or False]',
        '--size=None how large [an int or None]',
        '--folder=data where [a string or None]',
        '--kind=a which [a or b]',
        '--widths=(1, 2) how wide [(an int, ...)]',
    ]


@pytest.mark.parametrize('script', [
    'train.py', 'prepare.py', 'finetune_sst2.py', 'sample.py', 'bench.py'])
def test_every_option_of_the_scripts_has_its_line_of_help(script):
    run = shell(REPOSITORY / script, '--help')
    assert run.returncode == 0 and not run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith('  --')]
    assert len(lines) >= 6 and all(not line[1].startswith('[') for line in lines)


def test_a_user_error_is_one_line_on_stderr_and_status_2(tmp_path):
    run = shell(REPOSITORY / 'prepare.py', '--vocab_sise=3', cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, '')
    assert run.stderr == ('prepare.py: vocab_sise: there is no such option; '
                          'did you mean vocab_size?\n')
    assert not list(tmp_path.iterdir())
