"""Options of every script: a python config file, then --key=value, checked against a dataclass.

A config file is trusted python that assigns names. What an option is called, which values it takes,
its default and its line in --help are read from the dataclass that declares it: from the
annotation, the default, and the comment behind the field. An annotation Annotated[int, limits] also
says which numbers are allowed; `limits` is a Range of model.py.
"""

import ast
import contextlib
import difflib
import errno
import functools
import inspect
import itertools
import json
import os
import re
import runpy
import sys
import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend: `run` prints it as one line on stderr, exit status 2."""


@dataclass
class Option:
    type: object
    default: object
    help: str


def run(main):
    """Calls main() as a script: what the user can mend is one line and status 2, Ctrl-C is 130.
    What the terminal cannot show is replaced by a question mark."""
    name = Path(sys.argv[0]).name
    # None: the caller has closed it, and the next file to be opened would take its place
    sys.stdout = sys.stdout or open(os.devnull, 'w', errors='replace')
    sys.stderr = sys.stderr or open(os.devnull, 'w', errors='replace')
    sys.stdout.reconfigure(errors='replace')
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        reason = ' '.join(str(error).split())
        if not re.search('out of memory|allocate memory', reason) and type(error) is RuntimeError:
            raise
        print(f'{name}: out of memory ({reason[:100]}): take a smaller micro_batch_size, '
              'block_size or model', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.EPIPE:
            print(f'{name}: {error.filename or "output"}: {error.strerror or error}',
                  file=sys.stderr)
        # what is still to be printed must not fail again when python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141 if error.errno == errno.EPIPE else 2)


@functools.cache
def options_of(*classes):
    """{name: Option} for the fields of the dataclasses, in order. A field without a default value
    is not an option."""
    options = {}
    for cls in classes:
        bases = [base for base in cls.__mro__ if base is not object]
        source = '\n'.join(inspect.getsource(base) for base in bases)
        comments = dict(re.findall(r'^ {4}(\w+): .*?  # (.*)$', source, re.MULTILINE))
        for field in fields(cls):
            if field.default is not MISSING:
                option = Option(field.type, field.default, comments.get(field.name, ''))
                options.setdefault(field.name, option)
    return options


def load(argv, *classes, doc='', takes_config=True, refused={}, shown=None):
    """What a command line and its config file set: ({name: value}, the config's name or None).

    classes: the dataclasses whose fields are the options. refused: {name: what to use instead}.
    Raises UserError. --help prints the options with the values that they have so far, and exits.
    shown: says for these values which of the classes it prints; None = all.
    """
    known = options_of(*classes)
    wants_help = bool({'--help', '-h'} & set(argv))
    argv = [argument for argument in argv if argument not in ('--help', '-h')]
    paths = [argument for argument in argv if not argument.startswith('--')]
    if len(paths) > takes_config:
        extra = paths[1 if takes_config else 0]
        also = ', and there can be one config file' if takes_config else ''
        raise UserError(f'{extra}: options are written --key=value{also}')
    values = {}
    for path in paths:
        for name, value in run_config_file(path, known).items():
            try:
                values[name] = check(name, value, known, refused, where=f'{name}={value!r}')
            except UserError as error:
                raise UserError(f'{path}: {error}') from None
    for argument in argv:
        if argument in paths:
            continue
        name, equals, text = argument[2:].partition('=')
        check_name(name, known, refused)
        if not equals:
            example = 'True' if known[name].type is bool else 'VALUE'
            raise UserError(f'{argument}: write --{name}={example}')
        values[name] = check(name, parse(text), known, refused, where=argument, text=text)
    if wants_help:
        print_help(doc, shown(values) if shown else classes, values)
        sys.exit(0)
    return values, Path(paths[0]).stem if paths else None


def run_config_file(path, known):
    """{name: value} of the options that a config file assigns. What it imports or defines for its
    own use, and names with a leading underscore, are not options."""
    if not Path(path).is_file():
        configs = [config.stem for config in Path(__file__).parent.glob('[!_]*.py')]
        near = difflib.get_close_matches(Path(path).stem, configs, 1)
        hint = f'; did you mean config/{near[0]}.py?' if near else ''
        raise UserError(f'{path}: there is no such config file{hint}')
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # it is the user's own python, whatever is wrong
        raise UserError(f'{path}: {type(error).__name__}: {error}') from error
    literals = (bool, int, float, str, bytes, list, tuple, dict, set, type(None))
    return {name: value for name, value in names.items()
            if not name.startswith('_') and (name in known or isinstance(value, literals))}


def parse(text):
    """A python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check_name(name, known, refused):
    """Raises UserError if there is no option of this name."""
    if name in refused:
        raise UserError(f'{name}: {refused[name]}')
    if name not in known:
        near = difflib.get_close_matches(name, list(known), 1)
        hint = f'did you mean {near[0]}?' if near else '--help lists them'
        raise UserError(f'{name}: there is no such option; {hint}')


def check(name, value, known, refused, where, text=None):
    """The value, converted to the option's type. where: how the user wrote it, for the message.
    text: what stood behind the = on the command line."""
    check_name(name, known, refused)
    kind = known[name].type
    choices = choices_of(kind)
    candidates = [value]
    if str in choices and text is not None:
        candidates.append(text)  # --out_dir=2024 names a folder
    for candidate, choice in itertools.product(candidates, choices):
        with contextlib.suppress(ValueError, OverflowError):
            return convert(candidate, choice)
    raise UserError(f'{where}: takes {describe(kind)}')


def choices_of(kind):
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if union else (kind,)


def convert(value, kind):
    """The value as `kind`, which is not a union. Raises ValueError (OverflowError from an int that
    no float can hold) if it is no such value."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value = convert(value, arguments[0])
        if all(limits.allows(value) for limits in arguments[1:]):
            return value
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        values = value if isinstance(value, (tuple, list)) else (value,)  # --latents=2 is one
        if values:
            return tuple(convert(member, arguments[0]) for member in values)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind or value is None and kind is type(None):
        if kind is str:
            value.encode()  # bytes of a command line that are no UTF-8 raise a ValueError
        if kind is not str or '\0' not in value:
            return value
    raise ValueError


def read_json(path, remedy):
    """The dict that a json file holds. Raises UserError, which ends in the remedy, if it holds
    anything else, and OSError."""
    try:
        content = json.loads(Path(path).read_text('utf-8'))
        if not isinstance(content, dict):
            raise ValueError(f'holds {type(content).__name__}, not names and values')
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: damaged ({error}): {remedy}') from None
    return content


def read_json_lines(path):
    """The dicts of a jsonl file, one per line; [] if there is no such file. A kill may have cut off
    the last line, which is then left out. Raises UserError and OSError."""
    texts = path.read_text('utf-8').splitlines() if path.exists() else []
    lines = []
    for i, text in enumerate(texts):
        try:
            lines.append(json.loads(text))
            if not isinstance(lines[-1], dict):
                raise ValueError('not names and values')
        except ValueError as error:
            if i + 1 < len(texts):
                raise UserError(f'{path}: damaged in line {i + 1} ({error}): remove that '
                                'line') from None
    return [line for line in lines if isinstance(line, dict)]


def describe(kind):
    """A type in the words of --help."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return ' or '.join(describe(choice) for choice in arguments)
    if origin is typing.Annotated:
        number = 'a finite number' if arguments[0] is float else describe(arguments[0])
        return ' '.join((number, *map(str, arguments[1:])))
    if origin is typing.Literal:
        return ' or '.join(map(str, arguments))
    if origin is tuple:
        return f'({describe(arguments[0])}, ...)'
    return {int: 'an int', float: 'a float', str: 'a string', bool: 'True or False',
            type(None): 'None'}[kind]


def print_help(doc, classes, values):
    """values: what has been set; the other options show their default. A class may name fields of
    other classes as `derived`: it sets them itself, so they are no options beside it."""
    print(inspect.cleandoc(doc))
    if values:
        print('\n* is set by the config file or the command line')
    derived = {name for cls in classes for name in getattr(cls, 'derived', ())}
    printed = set()
    for cls in classes:
        left_out = printed if getattr(cls, 'derived', ()) else printed | derived
        options = {name: option for name, option in options_of(cls).items() if name not in left_out}
        printed |= set(options)
        print(f'\n{cls.__doc__.strip().splitlines()[0]}\n')
        for name, option in options.items():
            mark, value = ('*', values[name]) if name in values else (' ', option.default)
            takes = describe(option.type)
            print(f'{mark} --{name}={value}'.ljust(34) + f' {option.help} [{takes}]')
