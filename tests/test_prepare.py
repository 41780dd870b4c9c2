"""prepare.py: documents, splits, tokenizers, token files, and what it refuses."""

import bz2
import csv
import gzip
import json
import lzma
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import tokenizers
import tqdm
from tokenizers import models, pre_tokenizers, trainers

import prepare
from config import UserError
from conftest import REPOSITORY, corpus, shell
from prepare import Tokenizer, join_articles, make_tokenizer, read_tokens

WIKITEXT = ['\n', ' = One = \n', '\n', ' First . \n', '\n', ' = = Section = = \n', ' a = b = c \n',
            '\n', ' = E = mc2 = \n', '\n', ' Second . \n']
BYTES = ('--dataset=text', '--tokenizer=byte')
ODD = ['Ünïcödé 漢字 \U0001f469\u200d\U0001f467 x\u0301', "don't DON'T '",
       'two  spaces\n\n\ttab \n ', '\r\n\u00a0\u2028\x1c', 'aaaaaaa aaaaa', 'ΣΑΣ ΟΔΟΣ, Σ',
       '<|endoftext|> is text', '']


def decode(folder, split):
    tokenizer = Tokenizer.load(Path(folder) / 'tokenizer.json')
    return tokenizer.decode(read_tokens(folder, split)).split('<|endoftext|>')[1:]


def read_all(folder):
    """The documents of both splits, sorted."""
    return sorted(decode(folder, 'train') + decode(folder, 'val'))


def test_articles_of_wikitext():
    assert list(join_articles([*WIKITEXT, '\n', ' = x\n', '\n', '= Three =\n'])) == [
        '\n = One = \n\n First . \n\n = = Section = = \n a = b = c \n\n',
        ' = E = mc2 = \n\n Second . \n\n = x\n\n', '= Three =\n']


def test_embedded_corpus(workspace, script):
    script(prepare, '--vocab_size=600')
    folder = workspace / 'data' / 'wiki10k-bpe600'
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['train']['documents'] + meta['val']['documents'] == 10_033
    assert 0.04 < meta['val']['documents'] / 10_033 < 0.06
    for split in ('train', 'val'):
        ids = read_tokens(folder, split)
        assert ids.dtype == np.uint16 and len(ids) == meta[split]['tokens']
        # <|endoftext|> starts each document
        assert ids[0] == 597 and (ids == 597).sum() == meta[split]['documents']
        assert ids.max() == 597  # <|mask|> and <|pad|> are never in the data
    documents = read_all(folder)
    assert documents == sorted(row['text'] for row in prepare.wiki10k('train'))
    n_bytes = sum(len(text.encode()) for text in documents)
    assert n_bytes == meta['train']['bytes'] + meta['val']['bytes']


def test_the_seed_selects_what_is_held_out(data, script):
    selected = []
    for seed in (1, 1, 2):
        script(prepare, *BYTES, '--source=corpus.csv', f'--seed={seed}')
        selected.append((data / 'data/text-byte/val.bin').read_bytes())
    assert selected[0] == selected[1] != selected[2]


@pytest.mark.parametrize('packed, compress', [
    ('', None), ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)])
def test_tables_are_rows_of_documents(workspace, script, packed, compress):
    documents = ['a "quoted", text é', 'null', 'NA', '007', 'True', *map(str.strip, corpus(60))]
    for i, texts in enumerate((documents[::2], documents[1::2])):
        table = pandas.DataFrame({'id': range(len(texts)), 'text': texts})
        table.to_csv(f'{i}.csv', index=False)
        table.to_csv(f'{i}.tsv', sep='\t', index=False, quoting=csv.QUOTE_NONE)
        table.to_json(f'{i}.json', orient='records')
        for ending in ('jsonl', 'ndjson', 'JSONLINES', 'geojson', 'jl'):
            table.to_json(f'{i}.{ending}', orient='records', lines=True)
        if not packed:
            table.to_parquet(f'{i}.parquet')
    files = list(workspace.iterdir())
    for path in files if packed else ():
        Path(f'{path}{packed}').write_bytes(compress(path.read_bytes()))
    for ending in {path.suffix for path in files}:
        script(prepare, *BYTES, f'--source=*{ending}{packed}')
        assert read_all('data/text-byte') == sorted(documents)


def test_plain_text_keeps_every_byte_and_holds_out_the_last_tenth(workspace, script):
    text = 'Tab\there, no newline at the end, é and \u2028 too. ' * 40
    (workspace / 'a.txt').write_bytes(text.encode())
    (workspace / 'b.txt.gz').write_bytes(gzip.compress(text.encode()))
    for source in ('a.txt', 'b.txt.gz'):
        script(prepare, *BYTES, f'--source={source}')
        folder = workspace / 'data/text-byte'
        (train,), (val,) = decode(folder, 'train'), decode(folder, 'val')
        assert train + val == text and len(val) == -(-len(text) // 10)


def test_the_pieces_of_a_long_text_have_its_tokens(workspace, script, monkeypatch):
    def pieces(text, length):
        pattern = prepare.PIECE.pattern.replace('65536', str(length))
        monkeypatch.setattr(prepare, 'PIECE', re.compile(pattern, re.DOTALL))
        return prepare.PIECE.findall(text)

    text = ''.join(corpus(100) + ODD[:-2])
    tokenizer = make_tokenizer('bpe', False, corpus(50) + ODD * 9, 350)
    assert prepare.PIECE.findall('x ' * 99_999) == ['x ' * 32768 + 'x', ' x' * 32768, ' x' * 32768,
                                                   ' x' * 1694 + ' ']
    for length in (1, 3, 50):
        assert ''.join(pieces(text, length)) == text
        assert sum(tokenizer.encode_batch(pieces(text, length)), []) == tokenizer.encode(text)
    assert pieces('x' * 9, 4) == ['x' * 9] and pieces('', 4) == []
    assert pieces('ab cd\n\nef', 1) == ['ab', ' cd\n', '\nef']
    (workspace / 'a.txt').write_text(text)
    script(prepare, *BYTES, '--source=a.txt')
    (train,), (val,) = decode('data/text-byte', 'train'), decode('data/text-byte', 'val')
    assert train + val == text.replace('\r\n', '\n')


@pytest.mark.parametrize('name', [
    'a[1].txt', 'd[x]/a.txt', 'a*?{}.txt', 'a::b.txt', 'Valérie.txt', 'déval.txt'])
def test_a_name_is_taken_as_it_is(workspace, script, name):
    """Neither a pattern, nor cut at an accent so that it seems to be named val."""
    path = workspace / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('some words ' * 50)
    for source in (name, str(path.parent)):
        script(prepare, *BYTES, f'--source={source}')
        (train,), (val,) = decode('data/text-byte', 'train'), decode('data/text-byte', 'val')
        assert train + val == 'some words ' * 50 and len(val) == 55


def test_a_pattern_is_still_a_pattern(workspace, monkeypatch):
    for name in ('a1.txt', 'a2.txt', 'b1.txt', 'b1-Val.txt', 'val2.txt', 'test.txt'):
        (workspace / name).write_text('x')
    assert prepare.local_files('a[12].txt') == (['a1.txt', 'a2.txt'], [])
    assert prepare.local_files('*.txt') == (['a1.txt', 'a2.txt', 'b1.txt'],
                                            ['b1-Val.txt', 'val2.txt'])
    assert prepare.local_files('test.txt') == (['test.txt'], [])  # what is named alone is meant
    monkeypatch.setenv('HOME', str(workspace))
    assert prepare.local_files('~/b*.txt')[0] == [str(workspace / 'b1.txt')]


@pytest.mark.parametrize('kind', ['txt', 'csv', 'tsv', 'jsonl', 'json'])
def test_a_byte_order_mark_is_dropped(workspace, script, kind):
    texts = sorted(corpus(99))
    lines = {'txt': texts, 'jsonl': [json.dumps({'text': text}) + '\n' for text in texts],
             'json': [json.dumps(texts)]}.get(kind, ['text\n', *texts])
    (workspace / f'a.{kind}').write_text(''.join(lines), encoding='utf-8-sig')
    script(prepare, *BYTES, f'--source=a.{kind}')
    found = decode('data/text-byte', 'train') + decode('data/text-byte', 'val')
    if kind == 'txt':
        assert ''.join(found) == ''.join(texts)
    else:
        assert sorted(text.strip() for text in found) == [text.strip() for text in texts]


def test_rows_without_a_text_and_empty_files_are_left_out(workspace, script):
    (workspace / 'b.jsonl').write_text('')
    rows = [{'text': None}] + [{'text': text} for text in corpus(99)]
    (workspace / 'a.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
    script(prepare, '--dataset=text', '--source=*.jsonl', '--vocab_size=270')
    assert read_all(workspace / 'data/text-bpe270') == sorted(corpus(99))


def test_a_lone_surrogate_becomes_a_question_mark(workspace, script):
    (workspace / 'a.jsonl').write_text('"a\\ud800"\n' * 99)
    script(prepare, *BYTES, '--source=a.jsonl')
    assert read_all('data/text-byte') == ['a?'] * 99


def test_special_tokens_written_out_are_counted(workspace, script, capsys):
    (workspace / 'a.txt').write_text('<|endoftext|>some words' * 1200)
    script(prepare, *BYTES, '--source=a.txt')
    assert '1,200 literal <|endoftext|> in the text were encoded as' in capsys.readouterr().err
    assert 256 not in read_tokens('data/text-byte', 'train')[1:]


def test_runs_without_end(workspace, script, capsys, monkeypatch):
    """Training a BPE takes the square of a word's length; tiktoken takes no million spaces. Off a
    terminal a line now and then tells how far it is."""
    text = f'{"".join(corpus(200))}{"a" * 300_000} b{" " * 1_100_000}'
    (workspace / 'a.txt').write_text(text)
    monkeypatch.setattr(prepare, 'tqdm', lambda **settings: tqdm.tqdm(
        **settings | dict(delay=1e-9, mininterval=0)))
    script(prepare, '--dataset=text', '--source=a.txt', '--vocab_size=300')
    (train,), (val,) = decode('data/text-bpe300', 'train'), decode('data/text-bpe300', 'val')
    assert train + val == text
    assert re.search(r'tokenizing: [\d.]+[kM]? tokens in 00:\d\d\n', capsys.readouterr().err)


def test_a_trained_tokenizer_is_that_of_the_library():
    """No word of ordinary text is cut."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(ODD + ['x' * 999] + corpus(99), trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = make_tokenizer('bpe', False, ODD + ['x' * 999] + corpus(99), 353).content
    theirs = json.loads(library.to_str())
    assert content['model'] == theirs['model'] and len(theirs['model']['vocab']) == 350
    assert content['pre_tokenizer'] == theirs['pre_tokenizer']


def test_wikitext_from_gzip_lines_with_its_own_validation_file(workspace, script):
    (workspace / 'train_00.txt.gz').write_bytes(gzip.compress(''.join(WIKITEXT).encode()))
    (workspace / 'validation_1.txt.gz').write_bytes(gzip.compress(b'= Held out =\n\nText .\n'))
    (workspace / 'test_1.txt').write_bytes(b'never read')
    script(prepare, '--dataset=wikitext103', '--source=*.t*', '--tokenizer=byte',
           '--lowercase=True')
    folder = workspace / 'data/wikitext103-byte-lower'
    assert decode(folder, 'train') == [article.lower() for article in join_articles(WIKITEXT)]
    assert decode(folder, 'val') == ['= held out =\n\ntext .\n']


def test_sst2_sentences(workspace, script):
    for name, n in (('train', 9), ('dev', 3)):
        rows = ''.join(f'"a film {i} \t1\n' for i in range(n))
        (workspace / f'{name}.tsv').write_text(f'sentence\tlabel\n{rows}')
    script(prepare, '--dataset=sst2', '--source=*.tsv', '--tokenizer=byte')
    assert decode(workspace / 'data/sst2-byte', 'train') == [f'"a film {i} ' for i in range(9)]
    assert len(decode(workspace / 'data/sst2-byte', 'val')) == 3


@pytest.mark.parametrize('dataset', ['openwebtext', 'fineweb-edu'])
def test_data_of_millions_of_documents(workspace, script, dataset):
    """A share of 0.0005 is held out, of a local file too."""
    texts = [f'page {i}' for i in range(8_000)]
    pandas.DataFrame({'text': texts, 'url': 'x'}).to_parquet('0.parquet')
    script(prepare, f'--dataset={dataset}', '--source=0.parquet', '--tokenizer=byte')
    folder = workspace / f'data/{dataset}-byte'
    assert read_all(folder) == sorted(texts) and 0 < len(decode(folder, 'val')) < 12


def test_a_parquet_file_is_not_read_into_memory(workspace):
    import pyarrow
    text = random.Random(0).randbytes(16_000_000).hex()
    texts = [text[i:i + 4000] for i in range(0, len(text), 4000)]
    pandas.DataFrame({'text': texts}).to_parquet('a.parquet')
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before
            for _ in prepare.local_rows('a.parquet', by_line=False)]
    assert len(held) == len(texts) and max(held) < len(text) / 2


def test_the_hub_is_asked_for_the_right_thing(workspace, script, monkeypatch):
    """And once. There is no hub here: load_dataset is replaced by a function that notes its
    arguments."""
    import datasets
    asked = []

    def load_dataset(path, name=None, split=None, streaming=None):
        asked.append((path, name, split, streaming))
        column = 'sentence' if 'sst2' in path else 'text'
        texts = WIKITEXT if 'wikitext' in path else ['A page.'] * 8000
        return datasets.Dataset.from_dict({column: texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    for dataset in ('wikitext103', 'wikipedia', 'openwebtext', 'fineweb-edu', 'sst2'):
        script(prepare, f'--dataset={dataset}', '--tokenizer=byte')
    assert asked == [('Salesforce/wikitext', 'wikitext-103-raw-v1', 'train', True),
                     ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'validation', True),
                     ('wikimedia/wikipedia', '20231101.en', 'train', True),
                     ('Skylion007/openwebtext', None, 'train', True),
                     ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', True),
                     ('stanfordnlp/sst2', None, 'train', True),
                     ('stanfordnlp/sst2', None, 'validation', True)]
    assert len(decode(workspace / 'data/wikitext103-byte', 'train')) == 2


@pytest.mark.parametrize('lowercase', [False, True])
@pytest.mark.parametrize('kind', ['bpe', 'byte', 'gpt2'])
def test_a_tokenizer_gives_the_ids_of_the_library_and_the_text_back(
        workspace, monkeypatch, kind, lowercase):
    """tiktoken encodes, and cuts words by a pattern of its own; the library reads the same file."""
    merges = b'#version: 0.2\n\xc4\xa0 t\nt h\nth e\n'
    monkeypatch.setattr(prepare, 'read_file_cached', lambda *args: merges)
    sample = [row['text'] for row in prepare.wiki10k('train')][:300]
    tokenizer = make_tokenizer(kind, lowercase, sample, 900)
    n = dict(bpe=897, byte=256, gpt2=259)[kind]
    assert (tokenizer.eot, tokenizer.mask, tokenizer.pad) == (n, n + 1, n + 2)
    assert tokenizer.ids_needed(causal=False) == tokenizer.vocab_size == n + 3
    assert tokenizer.ids_needed(causal=True) == n + 1 and len(tokenizer.ranks) == n
    tokenizer.save('t.json')
    again = Tokenizer.load('t.json')
    assert again.digest() == tokenizer.digest() != again.digest('a.txt')
    texts = sample + ODD
    library = Tokenizer(tokenizer.content)
    for text, ids, theirs in zip(texts, again.encode_batch(texts), library.encode_batch(texts)):
        assert ids == theirs and max(ids, default=0) < n
        assert again.decode(ids) == (text.lower() if lowercase else text)
        if len(text) < 300:
            assert ''.join(again.decode_stream(ids)) == again.decode(ids)
    assert list(again.decode_stream([*again.encode('é!'), *again.encode('漢')[:1]]))[-2:] == [
        '!', '\ufffd']  # a character is shown when it is complete, or at the end
    assert again.decode([n, n + 1, n + 2]) == '<|endoftext|><|mask|><|pad|>'
    wanted = dict(byte=list(b'the!'), gpt2=[258, 0]).get(kind)
    assert wanted is None or again.encode('the!') == wanted


def test_large_vocabularies_take_four_bytes(workspace, script, monkeypatch):
    content = make_tokenizer('byte').content
    content['model']['vocab'] |= {f'{i:06}': 259 + i for i in range(66_000)}
    monkeypatch.setattr(prepare, 'make_tokenizer', lambda *args: Tokenizer(content))
    (workspace / 'a.txt').write_text('065999 ' * 20)
    script(prepare, *BYTES, '--source=a.txt')
    ids = read_tokens(workspace / 'data/text-byte', 'train')
    assert ids.dtype == np.uint32 and ids[1] == 259 + 65_999


@pytest.mark.parametrize('arguments, message', [
    (['--dataset=wiki'], f'must be one of {", ".join(prepare.DATASETS)}'),
    (['--dataset=text'], '--source=PATH_OR_GLOB'),
    (['--dataset=text', '--source=nothere*'], 'there is no such file'),
    (['--dataset=text', f'--source={"long" * 2000}'], 'there is no such file'),
    (['--dataset=text', '--source=d*.txt'], 'no file to train on (dev.txt: named val, valid,'),
    (['--dataset=text', '--source=empty'], 'the folder holds no files; for those of its folders'),
    (['--source='], 'source: is empty: name a file or folder'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=5000'], 'the corpus is too small'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=100'], 'must be from 259 to 1,048,576'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=1048577'], 'from 259 to 1,048,576'),
    ([*BYTES, '--source=a.txt', '--vocab_size=300'], 'has its own vocabulary'),
    ([*BYTES, '--source=a.txt', '--vocab_size=0'], 'vocab_size=0: must be an integer >= 1 or None'),
    ([*BYTES, '--source=a.txt', '--seed=-1'], 'seed=-1: must be an integer >= 0'),
    (['--dataset=wikitext103'], 'give local files with --source=PATH_OR_GLOB'),
])
def test_refusals_leave_nothing_behind(workspace, script, arguments, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    (workspace / 'dev.txt').write_text('held out')
    (workspace / 'empty').mkdir()
    with pytest.raises(UserError) as error:
        script(prepare, *arguments)
    assert message in str(error.value)
    assert not (workspace / 'data').exists() or not list((workspace / 'data').iterdir())


TORN = gzip.compress(random.Random(0).randbytes(9000), mtime=0)[:4000]


def table_of(value):
    return pandas.DataFrame({'text': [value] * 3})


@pytest.mark.parametrize('name, write, message', [
    ('a.csv', 'words,label\nx,1\n', "a.csv: each row must have text in a column 'text', not {'w"),
    ('bad.parquet', b'PAR1 no more', 'bad.parquet cannot be read'),
    ('bad.txt.gz', TORN, 'bad.txt.gz cannot be read'),
    ('latin1.txt', 'café'.encode('latin-1') * 50, 'latin1.txt cannot be read (UnicodeDecodeError'),
    ('bad.jsonl', '{"text": "a"}\n{"text": ', 'bad.jsonl cannot be read (JSONDecodeError'),
    ('deep.json', '[' * 100_000, 'deep.json cannot be read (RecursionError'),
    ('wide.csv', 'text\na, b\nc, d\n', 'wide.csv cannot be read (ValueError: a row has more'),
    ('torn.csv', 'text\na\n"b\nc', 'torn.csv cannot be read (Error: unexpected end'),
    ('one.csv', 'text\nx\n', 'val would be empty: too few documents in one.csv: add some'),
    ('one.txt', 'x', 'train would be empty: too few documents in one.txt: add some'),
    ('a.tar', b'a.txt\0\0\0words', 'plain text has no NUL bytes'),
    ('le.txt', 'words'.encode('utf-16-le'), 'plain text has no NUL bytes'),
    *[(name, content, f'train would be empty: no text in {name}') for name, content in [
        ('a.txt', ''), ('a.txt.gz', gzip.compress(b'', mtime=0)), ('a.txt', ' \n'),
        ('a.jsonl', ''), ('a.json', '[]'), ('a.csv', ''), ('a.csv', 'text\n'),
        ('a.parquet', lambda path: table_of('x')[:0].to_parquet(path))]],
    ('a.jsonl', '{"text": "x"}\n{"id": 1}', "must have text in a column 'text', not {'id': 1}"),
    ('a.jsonl', '{"text": ["x"]}', "must have text in a column 'text', not ['x']"),
    ('a.jsonl', '{"text": "x"}\n{"text": 2.5}', "must have text in a column 'text', not 2.5"),
    ('a.json', '[1, 2]', "a.json: each row must have text in a column 'text', not 1"),
    ('a.parquet', lambda path: table_of(b'x').to_parquet(path), "in a column 'text', not b'x'"),
    ('a.parquet', lambda path: table_of(7).to_parquet(path), "in a column 'text', not 7"),
    ('a.parquet', lambda path: table_of({'a': 1}).to_parquet(path), "not {'a': 1}"),
])
def test_files_that_are_refused(workspace, script, name, write, message):
    if callable(write):
        write(workspace / name)
    else:
        (workspace / name).write_bytes(write.encode() if isinstance(write, str) else write)
    with pytest.raises(UserError) as error:
        script(prepare, *BYTES, f'--source={name}')
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not list((workspace / 'data').iterdir())


def test_what_is_in_the_place_of_the_folder(workspace, script):
    (workspace / 'a.txt').write_text('some words ' * 50)
    (workspace / 'data').write_text('mine')
    with pytest.raises(OSError, match="data'$"):
        script(prepare, *BYTES, '--source=a.txt')
    (workspace / 'data').unlink()
    (workspace / 'data').mkdir()
    (workspace / 'data/text-byte').write_text('mine')
    with pytest.raises(UserError, match='data/text-byte: is there already, but is not prepared'):
        script(prepare, *BYTES, '--source=a.txt')
    assert (workspace / 'data/text-byte').read_text() == 'mine'
    with pytest.raises(OSError, match='data/text-byte/meta.json'):
        read_tokens('data/text-byte', 'train')
    (workspace / 'data/text-byte').unlink()
    (workspace / 'data/text-byte').symlink_to(workspace / 'elsewhere')
    for _ in range(2):  # the target of a link is written, and replaced
        script(prepare, *BYTES, '--source=a.txt')
        assert len(read_tokens(workspace / 'elsewhere', 'train')) == 496
    assert {path.name for path in workspace.iterdir()} == {'a.txt', 'data', 'elsewhere'}


def test_a_missing_corpus_package_says_what_to_do(workspace, script, monkeypatch):
    find = prepare.importlib.metadata.distribution
    monkeypatch.setattr(prepare.importlib.metadata, 'distribution', lambda name: find(f'no-{name}'))
    with pytest.raises(UserError, match='wiki10k cannot be read .* pip install -r'):
        script(prepare)


def change(name, **values):
    """Damage of a json file: other values, or with ... none at all."""
    def damage(folder):
        content = json.loads((folder / name).read_text()) | values
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))
    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize('damage, message', [
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin'),
    (write('train.bin', b'abc'), 'train.bin: has 3 bytes, but meta.json says'),
    (lambda folder: (folder / 'meta.json').unlink(), 'meta.json'),
    (write('meta.json', b'{"vocab'), 'meta.json: damaged'),
    (write('meta.json', b'\xff'), 'meta.json: damaged'),
    (write('meta.json', b'{}'), 'meta.json: was edited'),
    (change('meta.json', vocab_size='259'), 'meta.json: was edited'),
    (change('meta.json', lowercase=...), 'meta.json: was edited'),
    (change('meta.json', train={}), 'meta.json: was edited'),
    (lambda folder: (folder / 'tokenizer.json').unlink(), 'tokenizer.json'),
    (write('tokenizer.json', b'[]'), 'tokenizer.json: damaged'),
    (write('tokenizer.json', b'{}'), 'tokenizer.json: not a file of the library'),
    (write('tokenizer.json', b'{"name": "byte", "ranks": ["AA=="]}'),  # of earlier versions
     'tokenizer.json: not a file of the library'),
    (change('tokenizer.json', model={'type': 'BPE'}), 'tokenizer.json: not a file of the library'),
    (change('tokenizer.json', eot='</s>'), "has no token '</s>' for the end of a sequence"),
])
def test_damaged_data_is_refused(workspace, script, damage, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=a.txt')
    folder = workspace / 'data/text-byte'
    damage(folder)
    with pytest.raises((UserError, FileNotFoundError)) as error:
        read_tokens(folder, 'train'), read_tokens(folder, 'val')
        Tokenizer.load(folder / 'tokenizer.json')
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('happens, warned', [
    (lambda path: None, False),
    (lambda path: path.unlink(), False),  # the tokens are there
    (lambda path: path.write_text('other words ' * 60), True),
    (lambda path: os.utime(path, (0, 0)), False),
    (lambda path: path.with_name('b.txt').write_text('one more file'), True),
])
def test_a_source_that_has_changed_is_told(workspace, script, capsys, happens, warned):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=*.txt')
    happens(workspace / 'a.txt')
    capsys.readouterr()
    prepare.warn_if_source_changed('data/text-byte')
    err = capsys.readouterr().err
    assert err == ('data/text-byte: *.txt has changed since it was prepared: to use what it holds '
                   'now, remove the folder and prepare the data again\n' if warned else '')


def test_an_interrupted_run_leaves_the_old_data_set(workspace, script):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=a.txt')
    before = (workspace / 'data/text-byte/train.bin').read_bytes()
    (workspace / 'b.txt').write_text('other words ' * 3_000_000)
    run = subprocess.Popen([sys.executable, REPOSITORY / 'prepare.py', *BYTES, '--source=b.txt'],
                           stderr=subprocess.PIPE, text=True)
    data = workspace / 'data'
    while not list(data.glob('.text-byte.partial-*/new/train.bin')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (workspace / 'data/text-byte/train.bin').read_bytes() == before
    script(prepare, *BYTES, '--source=a.txt')  # and sweeps up what the killed run left
    assert [path.name for path in data.iterdir()] == ['text-byte']
    other = data / f'.text-byte.partial-{platform.node()}-{os.getpid()}-abc'  # of a running one
    other.mkdir()
    script(prepare, *BYTES, '--source=a.txt')
    assert other.exists()


def test_ctrl_c_is_one_line(workspace):
    (workspace / 'b.txt').write_text('other words ' * 3_000_000)
    run = subprocess.Popen([sys.executable, REPOSITORY / 'prepare.py', *BYTES, '--source=b.txt'],
                           stderr=subprocess.PIPE, text=True)
    while not list(workspace.glob('data/.text-byte.partial-*')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == 'prepare.py: interrupted\n' and run.returncode == 130
    assert not list((workspace / 'data').iterdir())


def test_ctrl_c_while_a_tokenizer_is_trained():
    train = ('import sys, itertools; sys.path.insert(0, sys.argv[1]); import config, prepare; '
             'documents = itertools.chain(map(print, ["started"]), itertools.repeat("words")); '
             'documents = filter(None, documents); config.run(lambda: '
             'prepare.make_tokenizer("bpe", False, documents, 300))')
    run = subprocess.Popen([sys.executable, '-uc', train, REPOSITORY], stderr=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'started\n'
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[1] == '-c: interrupted\n' and run.returncode == 130


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(workspace):
    folder, contents = workspace / 'data/wiki10k-bpe500', []
    for _ in range(2):
        assert shell(REPOSITORY / 'prepare.py', '--vocab_size=500').returncode == 0
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]
