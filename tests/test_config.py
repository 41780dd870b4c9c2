"""The option loader: python files, --key=value, and one line for what is wrong."""

import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Literal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import config
from config import UserError, check_value
from model import ConfigError
from conftest import REPOSITORY, shell
from model import Count, Range, Share


@dataclass
class Inherited:
    """Inherited options"""

    device: str = 'auto'  # which device
    rate: float = 0.1  # of something else


@dataclass
class Options(Inherited):
    """Some options"""

    name: str = 'x'  # a word
    n_layer: Count = 2  # how many
    rate: float = 0.5  # how fast
    share: Share | None = None  # which part
    flag: bool = False  # whether
    perhaps: bool | None = None  # whether, or it depends
    folder: str | None = 'data'  # where
    kind: Literal['a', 'b'] = 'a'  # which
    widths: tuple[Count, ...] = (1, 2)  # how wide


def load(*argv):
    return config.load(list(argv), Options, doc='Some script.', refused={'old_name': 'use name'})


@pytest.mark.parametrize('typed, value', [
    ('--name=a=b', 'a=b'), ('--name="Where?"', '"Where?"'), ('--name=2024', '2024'),
    ('--name=None', 'None'), ('--folder=None', None), ('--folder=7', '7'), ('--name=', ''),
    ('--n_layer=3', 3), ('--rate=1', 1.0), ('--rate=1e-3', 1e-3), ('--share=None', None),
    ('--share=0', 0.0), ('--flag=True', True), ('--perhaps=None', None), ('--kind=b', 'b'),
    ('--widths=(3, 4)', (3, 4)), ('--widths=[3]', (3,)), ('--widths=3', (3,)),
])
def test_text_is_taken_as_it_is_and_the_rest_as_a_literal(typed, value):
    (found,), config_name = load(typed)[0].values(), load(typed)[1]
    assert found == value and type(found) is type(value) and config_name is None


def test_a_home_folder_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert config.load(['--source=~/a*.txt', '--start=~/a'], *[make_dataclass('Paths', [
        ('source', str, field(default='')), ('start', str, field(default=''))])])[0] == dict(
            source='/home/me/a*.txt', start='~/a')


@pytest.mark.parametrize('kind, value, words', [
    (Count, 0, 'an integer >= 1'),
    (Count | None, 2.5, 'an integer >= 1 or None'),
    (int, True, 'an integer'),
    (Share, 1, 'a number >= 0 and < 1'),
    (Share, float('nan'), 'a number >= 0 and < 1'),
    (float, float('inf'), 'a number'),
    (Annotated[float, Range(above=0)], 0.0, 'a number > 0'),
    (bool, 1, 'True or False'),
    (str | None, 3, 'UTF-8 text or None'),
    (Literal['gelu', 'moe'], 'glu', 'one of gelu, moe'),
    (tuple[Count, ...], (), '(an integer >= 1, ...)'),
    (tuple[Count, ...], (1, 0), '(an integer >= 1, ...)'),
])
def test_a_wrong_value_is_told_what_it_must_be(kind, value, words):
    with pytest.raises(ConfigError) as error:
        check_value('x', value, kind)
    assert str(error.value) == f'x={value!r}: must be {words}'


def test_right_values():
    for kind, value in [(Count, 1), (Count | None, None), (Share, 0), (float, 1), (str, ''),
                        (Literal['a', 'b'], 'b'), (tuple[Count, ...], (1,)), (bool, False)]:
        check_value('x', value, kind)


@pytest.mark.parametrize('argv, message', [
    (['--n_layr=3'], 'n_layr: there is no such option; did you mean n_layer?'),
    (['--n_layer=3.5'], 'n_layer=3.5: must be an integer >= 1'),
    (['--n_layer='], "n_layer='': must be an integer"),
    (['--rate=fast'], "rate='fast': must be a number"),
    (['--rate=1' + '0' * 400], 'must be a number'),
    (['--name=\udcff'], 'must be UTF-8 text'),
    (['--kind=c'], "kind='c': must be one of a, b"),
    (['--widths=wide'], "widths='wide': must be (an integer >= 1, ...)"),
    (['--widths=(1, 2.5)'], 'widths=(1, 2.5): must be (an integer >= 1, ...)'),
    (['--flag'], '--flag: write --flag=True'),
    (['--perhaps'], '--perhaps: write --perhaps=True'),
    (['--rate'], '--rate: write --rate=VALUE'),
    (['--n_layer', '4'], '--n_layer: write --n_layer=VALUE'),
    (['--old_name=1'], 'old_name: use name'),
    (['nothere.py'], 'nothere.py: there is no such config file'),
    (['n_layer=2'], 'n_layer=2: options are written --key=value'),
    (['-n_layer=2'], '-n_layer=2: options are written --key=value'),
    (['config/mla_0.py'], 'no such config file; did you mean ../config/mla_o.py?'),
    (['a.py', 'b.py'], 'b.py: options are written --key=value, after at most one config file'),
])
def test_refusals(argv, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY / 'tests')
    with pytest.raises(UserError) as error:
        load(*argv)
    assert message in str(error.value)


def test_a_config_file_then_overrides(tmp_path):
    (tmp_path / 'base.py').write_text('"""Why."""\nimport math\n_half = 0.5\n'
                                      'rate = _half * math.sqrt(4)\nname = "base"\n')
    path = tmp_path / 'run.py'
    path.write_text(f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n'
                    'from base import *\nn_layer = 7\nwidths = [8]\n')
    wanted = dict(rate=1.0, name='mine', n_layer=7, widths=(8,))
    assert load(str(path), '--name=mine') == (wanted, 'run')


@pytest.mark.parametrize('source, message', [
    ('n_layer = = 3', 'SyntaxError'),
    ('n_layer = undefined', "NameError: name 'undefined' is not defined"),
    ('n_layer = "3"', "n_layer='3': must be an integer"),
    ('n_layr = 3', 'did you mean n_layer?'),
    ('from config.nothing import *', 'ModuleNotFoundError'),
    ('rate = lambda: 3', 'rate=<function'),
    ('exit(0)', 'SystemExit'),
])
def test_broken_config_files(tmp_path, source, message):
    path = tmp_path / 'broken.py'
    path.write_text(source)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert str(error.value).startswith(f'{path}: ') and message in str(error.value)


def test_what_a_config_imports_is_no_option(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text('from __future__ import annotations\nfrom math import sqrt\n'
                    'from typing import Literal\nrate = sqrt(4)\n')
    assert load(str(path))[0] == dict(rate=2.0)


def test_help_prints_every_option_with_value_meaning_and_type(capsys):
    with pytest.raises(SystemExit) as exit:
        load('--help', '--kind=b')
    assert exit.value.code == 0
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        'Some script.', '* is set by the config file or the command line',
        'Some options',
        '--name=x a word [str]',
        '--n_layer=2 how many [int >= 1]',
        '--rate=0.5 how fast [float]',
        '--share=None which part [float >= 0 and < 1 or None]',
        '--flag=False whether [bool]',
        '--perhaps=None whether, or it depends [bool or None]',
        '--folder=data where [str or None]',
        '* --kind=b which [a | b]',
        '--widths=(1, 2) how wide [(int >= 1, ...)]',
        'Inherited options',
        '--device=auto which device [str]',
    ]


@pytest.mark.parametrize(
    'name', ['train', 'prepare', 'finetune_sst2', 'sample', 'bench', 'svd', 'sweep'])
def test_every_option_of_the_scripts_has_its_line_of_help(name, script, capsys):
    with pytest.raises(SystemExit) as exit:
        script(importlib.import_module(name), '--help')
    lines = capsys.readouterr().out.splitlines()
    options = [line.split() for line in lines if line.startswith('  --')]
    assert exit.value.code == 0 and len(options) >= 4
    assert all(not words[1].startswith('[') for words in options)


# --------------------------------------------------------------------------------------------------
# run


class ArrayMemoryError(MemoryError):
    """As numpy's."""


@pytest.mark.parametrize('error, status, message', [
    (UserError('two\nlines'), 2, 'x.py: two lines\n'),
    (KeyboardInterrupt(), 130, 'x.py: interrupted\n'),
    (MemoryError(), 2, 'x.py: out of memory'),
    (ArrayMemoryError('Unable to allocate 8 GiB'), 2, 'x.py: out of memory (Unable'),
    (RuntimeError('CUDA out of memory. Tried to allocate 20 GiB'), 2, 'x.py: out of memory (CUDA'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, 'x.py: out of memory'),
])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, status, message):
    def main():
        raise error

    monkeypatch.setattr(sys, 'argv', ['/somewhere/x.py'])
    with pytest.raises(SystemExit) as exit:
        config.run(main)
    lines = capsys.readouterr().err
    assert exit.value.code == status and lines.startswith(message) and lines.count('\n') == 1


@pytest.mark.parametrize('rank, waits', [(0, []), (1, [10])])
def test_torchrun_ends_with_the_line(monkeypatch, tmp_path, capsys, rank, waits):
    """Rank 0 says it at once; others wait, because torchrun then ends them."""
    def main():
        raise UserError('no such file')

    slept, file = [], tmp_path / 'error.json'
    monkeypatch.setattr(sys, 'argv', ['x.py'])
    monkeypatch.setattr(config.time, 'sleep', slept.append)
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(file))
    monkeypatch.setenv('RANK', str(rank))
    with pytest.raises(SystemExit):
        config.run(main)
    assert slept == waits and capsys.readouterr().err == 'x.py: no such file\n'
    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(file))
    assert 'traceback : x.py: no such file\n' in str(ChildFailedError('x', {rank: failure}))


@pytest.mark.parametrize('error', [RuntimeError('shapes differ'), NotImplementedError('later')])
def test_a_bug_has_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        config.run(main)


# a script that prints the value of an expression: python -c SCRIPT REPOSITORY EXPRESSION
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import config

text, sys.argv = eval(sys.argv[2]), ['x.py']
config.run(lambda: print(text))
"""
CLOSED_PIPE = """
import os
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
"""


def test_a_missing_file_is_named():
    result = shell('-c', SCRIPT.replace('print', 'open'), REPOSITORY, '"nothere.txt"')
    assert (result.returncode, result.stderr) == (2, 'x.py: nothere.txt: No such file or '
                                                     'directory\n')


def test_a_reader_that_leaves_early_is_no_error():
    """As `| head` does: the pipe is closed before anything is written."""
    result = shell('-c', CLOSED_PIPE + SCRIPT, REPOSITORY, '"text"')
    assert result.returncode == 141 and not result.stderr


@pytest.mark.parametrize('redirection, status, message', [
    ('>&-', 0, ''), ('>&- 2>&-', 0, ''),
    ('>/dev/full', 2, 'x.py: output: No space left on device\n')])
def test_a_closed_or_full_output(redirection, status, message):
    command = shlex.join([sys.executable, '-c', SCRIPT, str(REPOSITORY), '"text"'])
    result = subprocess.run(f'{command} {redirection}', shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (status, message)


def test_what_a_terminal_cannot_show_is_replaced():
    ascii = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    result = shell('-c', SCRIPT, REPOSITORY, r'"a \xe9\u6f22"', env=ascii)
    assert (result.returncode, result.stdout, result.stderr) == (0, 'a ??\n', '')


# --------------------------------------------------------------------------------------------------
# json files


@pytest.mark.parametrize('content', ['{', '[]', '3', '\xff', '[' * 100_000])
def test_a_damaged_json_file_is_one_line(tmp_path, content):
    path = tmp_path / 'some.json'
    path.write_text('{"a": 1}', 'utf-8')
    assert config.read_json(path, 'make it again') == {'a': 1}
    path.write_text(content, 'latin-1')
    with pytest.raises(UserError, match=r'some.json: damaged \(.*\): make it again'):
        config.read_json(path, 'make it again')


def test_only_the_last_line_of_a_jsonl_file_may_be_cut_off(tmp_path):
    path = tmp_path / 'some.jsonl'
    assert config.read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert config.read_json_lines(path) == [{'a': 1}, {'a': 2}]
    for damaged in ('{"a": 1}\n{"a"\n{"a": 3}\n', '{"a": 1}\n2\n{"a": 3}\n'):
        path.write_text(damaged)
        with pytest.raises(UserError, match='some.jsonl: damaged in line 2 '):
            config.read_json_lines(path)


def test_ctrl_c_while_torch_loads_is_one_line():
    started = 'import sys; sys.path.insert(0, sys.argv[1]); import _thread, builtins; ' \
              'real = builtins.__import__; ' \
              'builtins.__import__ = lambda name, *a: ' \
              '_thread.interrupt_main() if name == "torch" else real(name, *a); import train'
    run = shell('-c', started, REPOSITORY)
    assert run.stderr == '-c: interrupted\n' and run.returncode not in (0, 1)
