"""Options of every script: a python config file, then --key=value, checked against a dataclass.

A config file is trusted python that assigns names. What an option is called, which values it takes,
its default and its line in --help are read from the dataclass that declares it: from the
annotation, the default, and the comment after the field.
"""

import ast
import contextlib
import difflib
import errno
import inspect
import json
import os
import re
import runpy
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path


def quiet_interrupt(kind, error, traceback):
    if kind is KeyboardInterrupt:
        return print(f'{Path(sys.argv[0]).name}: interrupted', file=sys.stderr)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = quiet_interrupt  # from here on, as torch takes seconds to import

from model import ConfigError, allows, check_value, describe

PATHS = 'out_dir', 'init_from', 'source', 'export', 'data_dir', 'results', 'profile'  # options


class UserError(Exception):
    """An error that the user can fix: `run` prints it as one line on stderr, exit status 2."""


def run(main):
    """Calls main() as a script: a UserError is one line and exit status 2, Ctrl-C is 130."""
    # a stream that the caller closed is None, and the next file opened would get its descriptor
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    # print ? for characters that the terminal lacks; flush each line, so that errors come after it
    sys.stdout.reconfigure(errors='replace', line_buffering=True)
    status = 2
    try:
        return main()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = 'interrupted', 130
    except OSError as error:
        # what is still to be printed must not fail again when python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # nobody reads on, as after `| head`
            sys.exit(141)
        message = f'{error.filename or "output"}: {error.strerror or error}'
    except (RuntimeError, MemoryError) as error:
        message = f'out of memory ({str(error)[:100]}): take a smaller batch, block_size or model'
        if re.search('by peer', str(error)):
            message = f'another process of this run has ended ({error})'
        elif isinstance(error, RuntimeError) and not re.search('(of|allocate) memory', str(error)):
            raise
    line = f'{Path(sys.argv[0]).name}: {" ".join(message.split())}'
    report = os.environ.get('TORCHELASTIC_ERROR_FILE')  # torchrun prints at its end what this holds
    if report and status == 2 and os.environ.get('RANK', '0') != '0':
        time.sleep(10)  # unless only this one found it, rank 0 says it, and torchrun ends this one
    print(line, file=sys.stderr)
    if report:
        content = dict(message=line, extraInfo=dict(timestamp=int(time.time())))
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps(dict(message=content)))
    sys.exit(status)


# --------------------------------------------------------------------------------------------------
# config file and command line


def convert(value, kind, typed):
    """The value converted to the type of its option, `kind`: 1 to 1.0 for a float, to (1,) for a
    tuple. typed: the value is text from the command line, a python literal unless kind is str."""
    if typed and (not allows(kind, value) or value == 'None' and allows(kind, None)):
        with contextlib.suppress(Exception):  # what is no literal will not pass check_value
            value = ast.literal_eval(value)
    if not allows(kind, value):
        parts = tuple(value) if isinstance(value, list) else (value,)
        value = parts if allows(kind, parts) else value
    if type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value) if allows(kind, float(value)) else value
    return value


def options_of(*classes):
    """{name: dataclasses.Field} of the fields that have a default. If several classes have a field
    of one name, the first one's counts."""
    return {field.name: field for cls in reversed(classes) for field in fields(cls)
            if field.default is not MISSING}


def load(argv, *classes, doc='', takes_config=True, refused={}, shown=None):
    """What a command line and its config file set: ({name: value}, the config's name or None).

    classes: the dataclasses whose fields are the options. refused: {name: what to use instead}.
    Raises UserError. --help prints the options with the values that they have so far, and exits.
    shown: function of the values that returns the classes to print; None = all.
    """
    known, values = options_of(*classes), {}
    arguments = [argument for argument in argv if argument not in ('--help', '-h')]
    paths = [argument for argument in arguments if not argument.startswith('--')]
    typed = [argument[2:].partition('=') for argument in arguments if argument.startswith('--')]
    for name, equals, _ in typed:  # first, because the 4 of `--n_layer 4` is no config file
        check_name(name, known, refused)
        if not equals:
            example = 'True' if allows(known[name].type, True) else 'VALUE'
            raise UserError(f'--{name}: write --{name}={example}')
    for path in paths:
        if path.lstrip('-\u2013\u2014').partition('=')[0] in known:
            raise UserError(f'{path}: options are written --key=value')
    if len(paths) > takes_config:
        also = ', after at most one config file' if takes_config else ''
        raise UserError(f'{paths[-1]}: options are written --key=value{also}')
    given = [(path, *item) for path in paths for item in run_config_file(path, known).items()]
    for path, name, value in given + [(None, name, text) for name, _, text in typed]:
        try:
            check_name(name, known, refused)
            values[name] = convert(value, known[name].type, typed=path is None)
            check_value(name, values[name], known[name].type)
            if name in PATHS and values[name] is not None:
                if not values[name]:  # as of --key=$UNSET
                    raise UserError(f'{name}: is empty: name a file or folder, or leave it out')
                values[name] = os.path.expanduser(values[name])  # shells leave the ~ of --key=~/x
        except (UserError, ConfigError) as error:
            raise UserError(f'{path}: {error}' if path else str(error)) from None
    if len(arguments) < len(argv):
        print_help(doc, shown(values) if shown else classes, values)
        sys.exit(0)
    return values, Path(paths[0]).stem if paths else None


def check_name(name, known, refused):
    """Raises UserError if there is no option of this name."""
    if name in refused:
        raise UserError(f'{name}: {refused[name]}')
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f'did you mean {near[0]}?' if near else '--help lists them'
        raise UserError(f'{name}: there is no such option; {hint}')


def run_config_file(path, known):
    """{name: value} of the options that a config file assigns. What it imports or defines for its
    own use, and names with a leading underscore, are not options."""
    if not Path(path).is_file():
        configs = {config.stem: config for config in Path(__file__).parent.glob('[!_]*.py')}
        near = difflib.get_close_matches(Path(path).stem, configs, 1)
        hint = f'; did you mean {os.path.relpath(configs[near[0]])}?' if near else ''
        raise UserError(f'{path}: there is no such config file{hint}')
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # it is the user's own python, whatever is wrong
        raise UserError(f'{path}: {type(error).__name__}: {error}') from error
    plain = (int, float, str, list, tuple, dict, type(None))
    return {name: value for name, value in names.items()
            if not name.startswith('_') and (name in known or isinstance(value, plain))}


def print_help(doc, classes, values):
    """Prints options with the values that have been set, or their defaults: those that a class
    declares itself, then those that it inherits. What a class has in `derived`, because it sets
    these fields itself, is left out."""
    print((doc or '').strip())
    if values:
        print('\n* is set by the config file or the command line')
    groups = dict.fromkeys(base for cls in classes for base in cls.__mro__ if base is not object)
    derived = {name for group in groups for name in getattr(group, 'derived', ())}
    printed = set()
    for group in groups:
        source = inspect.getsource(group)
        comments = dict(re.findall(r'^ {4}(\w+): .*?(?:  # (.*))?$', source, re.MULTILINE))
        known = options_of(group)
        new = known.keys() - printed - derived
        options = {name: known[name] for name in comments if name in new}
        if options:
            print(f'\n{inspect.cleandoc(group.__doc__).splitlines()[0]}\n')
        for name, field in options.items():
            mark, value = ('*', values[name]) if name in values else (' ', field.default)
            print(f'{mark} --{name}={value}'.ljust(30),
                  f'{comments[name]} [{describe(field.type, brief=True)}]')
        printed |= set(options)


# --------------------------------------------------------------------------------------------------
# json files


def check_content(content, kinds, where, remedy):
    """The dict `content`. Raises UserError, which ends in the remedy, if it lacks a value of one of
    the types `kinds`, {key: type}."""
    for name, kind in kinds.items():
        if not allows(kind, content.get(name)):
            raise UserError(f'{where}: damaged ({name}={content.get(name)!r:.60}): {remedy}')
    return content


def read_json(path, remedy, **kinds):
    """The dict that a json file holds, with values of these types. Raises UserError, which ends in
    the remedy, if it holds anything else, and OSError."""
    try:
        content = {**json.loads(Path(path).read_text('utf-8'))}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: damaged ({error}): {remedy}') from None
    return check_content(content, kinds, path, remedy)


def read_json_lines(path, **kinds):
    """The dicts of a jsonl file, one per line, with values of these types; [] if there is no such
    file. A kill may have cut off the last line, which is then left out. Raises UserError and
    OSError."""
    texts = path.read_text('utf-8', 'replace').splitlines() if path.exists() else []
    lines, remedy = [], 'remove that line'
    for i, text in enumerate(texts, 1):
        try:
            line = {**json.loads(text)}
        except (ValueError, TypeError, RecursionError) as error:
            if i < len(texts):
                raise UserError(f'{path}: damaged in line {i} ({error}): {remedy}') from None
        else:
            lines.append(check_content(line, kinds, f'{path}, line {i}', remedy))
    return lines
