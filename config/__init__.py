"""Options for every script: a python config file, then --key=value, each checked against a dataclass.

A config file is trusted python that assigns names; names with a leading underscore, modules and functions in it are
not options. What an option is called, which type it takes, its default and its line in --help are read from the
dataclass that declares it: the annotation, the default, and the comment behind the field.
"""

import ast
import difflib
import functools
import inspect
import math
import os
import re
import runpy
import select
import sys
import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. `run` prints it as one line on stderr and exits with status 2."""


@dataclass
class Option:
    type: object
    default: object
    help: str


def run(main):
    """Calls main() as a script: what the user can mend is one line and status 2, Ctrl-C is 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def reader_left():
    """Whether nobody reads the standard output any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@functools.cache
def options_of(*classes):
    """{name: Option} for the fields of the dataclasses, in order."""
    options = {}
    for cls in classes:
        source = '\n'.join(inspect.getsource(base) for base in cls.__mro__ if base is not object)
        comments = dict(re.findall(r'^ {4}(\w+): .*?  # (.*)$', source, re.MULTILINE))
        for field in fields(cls):
            default = None if field.default is MISSING else field.default
            options.setdefault(field.name, Option(field.type, default, comments.get(field.name, '')))
    return options


def load(argv, *classes, doc='', takes_config=True, refused={}):
    """The options that a command line and its config file set, as {name: value}, and the config's name or None.

    classes: the dataclasses whose fields are the options. refused: {name: what to use instead}.
    Raises UserError; --help prints every option and exits.
    """
    known = options_of(*classes)
    if {'--help', '-h'} & set(argv):
        print_help(doc, classes)
        sys.exit(0)
    paths = [argument for argument in argv if not argument.startswith('--')]
    if len(paths) > (1 if takes_config else 0):
        extra = paths[1 if takes_config else 0]
        raise UserError(f'{extra}: options are written --key=value'
                        + (', and there can be one config file' if takes_config else ''))
    values = {}
    for path in paths:
        for name, value in run_config_file(path).items():
            try:
                values[name] = check(name, value, known, refused, where=f'{name}={value!r}')
            except UserError as error:
                raise UserError(f'{path}: {error}') from None
    for argument in argv:
        if argument in paths:
            continue
        name, equals, text = argument[2:].partition('=')
        if not equals:
            check(name, None, known, refused, where=None)
            raise UserError(f'{argument}: write --{name}={"True" if known[name].type is bool else "VALUE"}')
        values[name] = check(name, parse(text), known, refused, where=argument, text=text)
    return values, Path(paths[0]).stem if paths else None


def run_config_file(path):
    """{name: value} of what a config file assigns."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).stem, [p.stem for p in Path(__file__).parent.glob('*.py')], 1)
        hint = f'; did you mean config/{near[0]}.py?' if near and near[0] != '__init__' else ''
        raise UserError(f'{path}: there is no such config file{hint}')
    try:
        names = runpy.run_path(path)
    except Exception as error:  # a config file is the user's own python: whatever is wrong with it is theirs to mend
        raise UserError(f'{path}: {type(error).__name__}: {error}') from error
    return {name: value for name, value in names.items()
            if not name.startswith('_') and not isinstance(value, (types.ModuleType, types.FunctionType, type))}


def parse(text):
    """A python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(name, value, known, refused, where, text=None):
    """`value` as the option's type; where: how the user wrote it; text: what stood behind the = if it was typed.
    With where=None only the name is checked."""
    if name in refused:
        raise UserError(f'{name}: {refused[name]}')
    if name not in known:
        near = difflib.get_close_matches(name, list(known), 1)
        raise UserError(f'{name}: there is no such option; ' + (f'did you mean {near[0]}?' if near else '--help lists them'))
    if where is None:
        return None
    kind = known[name].type
    choices = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for choice in choices:
        if choice is type(None) and value is None:
            return None
        if typing.get_origin(choice) is typing.Literal and value in typing.get_args(choice):
            return value
        if choice is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(choice) is tuple:
            values = tuple(value) if isinstance(value, (tuple, list)) else (value,)  # --latents=2 is one of them
            if values and all(type(v) is typing.get_args(choice)[0] for v in values):
                return values
        if type(value) is choice:
            return value
    if str in choices and text is not None:
        return text  # --out_dir=2024 names a folder
    raise UserError(f'{where}: takes {describe(kind)}')


def check_numbers(options, *zero_is_fine):
    """Refuses numbers in a dataclass of options that are below zero, not finite, or zero, but for those named."""
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value < math.inf or value == 0 and name not in zero_is_fine:
                raise UserError(f'{name}={value}: takes a finite number '
                                + ('from zero up' if name in zero_is_fine else 'above zero'))


def make_folder(path, option):
    """The folder that an option names, made where it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path}: cannot be made ({error}): set --{option}') from None
    return Path(path)


def describe(kind):
    """A type in the words of --help."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return ' or '.join(describe(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return ' or '.join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f'({describe(typing.get_args(kind)[0])}, ...)'
    return {int: 'an int', float: 'a float', str: 'a string', bool: 'True or False', type(None): 'None'}[kind]


def print_help(doc, classes):
    print(inspect.cleandoc(doc))
    shown = set()
    for cls in classes:
        options = {name: option for name, option in options_of(cls).items() if name not in shown}
        shown |= set(options)
        print(f'\n{cls.__doc__.strip().splitlines()[0]}\n')
        for name, option in options.items():
            print(f'  --{name}={option.default}'.ljust(34) + f' {option.help} [{describe(option.type)}]')
