"""prepare.py: documents, splits, tokenizers, token files, and what it refuses."""

import base64
import csv
import gzip
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
from config import UserError
from conftest import REPOSITORY, corpus, shell
from prepare import Tokenizer, is_title, join_articles, read_tokens

WIKITEXT = ['\n', ' = One = \n', '\n', ' First . \n', '\n', ' = = Section = = \n', ' a = b = c \n',
            '\n', ' = E = mc2 = \n', '\n', ' Second . \n']
BYTES = ('--dataset=text', '--tokenizer=byte')


def decode(folder, split):
    tokenizer = Tokenizer.load(Path(folder) / 'tokenizer.json')
    return tokenizer.decode(read_tokens(folder, split)).split('<|endoftext|>')[1:]


def read_all(folder):
    """The documents of both splits, sorted."""
    return sorted(decode(folder, 'train') + decode(folder, 'val'))


def write_files(folder, documents):
    """The same documents in every format that --source reads, two files each."""
    import pandas
    folder.mkdir()
    for part, texts in (('a', documents[::2]), ('b', documents[1::2])):
        table = pandas.DataFrame({'id': range(len(texts)), 'text': texts})
        table.to_parquet(folder / f'{part}.parquet')
        table.to_csv(folder / f'{part}.csv', index=False)
        table.to_json(folder / f'{part}.jsonl', orient='records', lines=True)
        table.assign(text=[text.strip() for text in texts]).to_csv(
            folder / f'{part}.tsv', sep='\t', index=False, quoting=csv.QUOTE_NONE)
    for path in list(folder.iterdir()):
        if path.suffix != '.parquet':
            path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))


def test_headings_of_wikitext():
    assert all(map(is_title, (' = One = \n', '= One =')))
    assert not any(map(is_title, (' = = Two = = \n', ' = = = Three = = = ', 'a = b', ' = x')))
    assert list(join_articles(WIKITEXT)) == [
        '\n = One = \n\n First . \n\n = = Section = = \n a = b = c \n\n',
        ' = E = mc2 = \n\n Second . \n']


def test_embedded_corpus(workspace, script, capsys):
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
    assert documents == sorted(prepare.wiki10k())
    n_bytes = sum(len(text.encode()) for text in documents)
    assert n_bytes == meta['train']['bytes'] + meta['val']['bytes']
    assert 'CC BY-SA' in capsys.readouterr().out


def test_the_seed_chooses_what_is_held_out(workspace, script):
    write_files(workspace / 'files', corpus(200))
    chosen = []
    for seed in (1, 1, 2):
        script(prepare, *BYTES, '--source=files/*.csv', f'--seed={seed}')
        chosen.append((workspace / 'data/text-byte/val.bin').read_bytes())
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'tsv', 'jsonl', 'csv.gz', 'tsv.gz', 'jsonl.gz'])
def test_tables_are_rows_of_documents(workspace, script, kind):
    documents = ['a "quoted", text é\n', 'null\n', 'NA\n'] + corpus(60)
    write_files(workspace / 'files', documents)
    script(prepare, *BYTES, f'--source=files/*.{kind}')
    found = read_all(workspace / 'data/text-byte')
    assert sorted(text.strip() for text in found) == sorted(text.strip() for text in documents)


def test_plain_text_keeps_every_byte_and_holds_out_the_last_tenth(workspace, script):
    text = 'Tab\there, no newline at the end, é and \u2028 too. ' * 40
    (workspace / 'a.txt').write_bytes(text.encode())
    (workspace / 'b.txt.gz').write_bytes(gzip.compress(text.encode()))
    for source in ('a.txt', 'b.txt.gz'):
        script(prepare, *BYTES, f'--source={source}')
        folder = workspace / 'data/text-byte'
        (train,), (val,) = decode(folder, 'train'), decode(folder, 'val')
        assert train + val == text and len(val) == -(-len(text) // 10)


def test_a_long_file_is_encoded_in_pieces(workspace, script, monkeypatch):
    text = ''.join(corpus(300))
    assert list(prepare.pieces('ab\n' * 9, 7)) == ['ab\nab\n'] * 4 + ['ab\n']
    assert list(prepare.pieces('x' * 9, 4)) == ['x' * 9]
    (workspace / 'a.txt').write_text(text)
    cut = prepare.pieces
    monkeypatch.setattr(prepare, 'pieces', lambda text: cut(text, 1000))
    script(prepare, '--dataset=text', '--source=a.txt', '--vocab_size=300')
    folder = workspace / 'data/text-bpe300'
    (train,), (val,) = decode(folder, 'train'), decode(folder, 'val')
    assert train + val == text


@pytest.mark.parametrize('name', [
    'a[1].txt', 'd[x]/a.txt', 'a*?{}.txt', 'Valérie.txt', 'déval.txt',
    unicodedata.normalize('NFD', 'vaĺ.txt')])
def test_a_name_is_taken_as_it_is(workspace, script, name):
    """Neither a pattern, nor cut at an accent so that it seems to be named val."""
    path = workspace / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('some words ' * 50)
    for source in (name, str(path.parent)):
        script(prepare, *BYTES, f'--source={source}')
        assert ''.join(decode(workspace / 'data/text-byte', 'train')).startswith('some words')
        assert 'last tenth' in json.loads(Path('data/text-byte/meta.json').read_text())['split']


def test_a_pattern_is_still_a_pattern(workspace):
    for name in ('a1.txt', 'a2.txt', 'b1.txt', 'b1-Val.txt', 'val2.txt', 'test.txt'):
        (workspace / name).write_text('x')
    assert prepare.local_files('a[12].txt') == (['a1.txt', 'a2.txt'], [])
    assert prepare.local_files('*.txt') == (['a1.txt', 'a2.txt', 'b1.txt'],
                                            ['b1-Val.txt', 'val2.txt'])


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


def test_rows_without_a_text(workspace, script):
    rows = [{'text': None}, {'id': 1}] + [{'text': text} for text in corpus(99)]
    (workspace / 'a.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
    script(prepare, '--dataset=text', '--source=a.jsonl', '--vocab_size=270')
    assert read_all(workspace / 'data/text-bpe270') == sorted(corpus(99))


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


def test_the_hub_is_asked_for_the_right_thing(workspace, script, monkeypatch):
    """There is no hub here: load_dataset is replaced by a function that notes its arguments."""
    import datasets
    asked = []

    def load_dataset(path, name=None, split=None, streaming=None):
        asked.append((path, name, split, streaming))
        column = 'sentence' if 'sst2' in path else 'text'
        texts = WIKITEXT if 'wikitext' in path else corpus(500)
        return datasets.Dataset.from_dict({column: texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    for dataset in ('wikitext103', 'wikipedia', 'sst2'):
        script(prepare, f'--dataset={dataset}', '--tokenizer=byte')
    assert set(asked) == {('Salesforce/wikitext', 'wikitext-103-raw-v1', 'train', True),
                          ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'validation', True),
                          ('wikimedia/wikipedia', '20231101.en', 'train', True),
                          ('stanfordnlp/sst2', None, 'train', True),
                          ('stanfordnlp/sst2', None, 'validation', True)}
    assert len(decode(workspace / 'data/wikitext103-byte', 'train')) == 2


def test_bpe_cuts_text_like_the_library_that_trained_it():
    from tokenizers import Tokenizer as Trainable, models, pre_tokenizers, trainers
    texts = list(prepare.wiki10k())[:300]
    ours = prepare.train_bpe(texts, 900, lowercase=False)
    theirs = Trainable(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=897, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    for text in texts + ['Ünïcödé 漢字 🙂  two  spaces\n\n\ttab', '<|endoftext|> is text']:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == 900 and (ours.eot, ours.mask, ours.pad) == (897, 898, 899)


def test_lowercase_belongs_to_the_tokenizer():
    lower = prepare.train_bpe(corpus(50), 300, lowercase=True)
    assert lower.decode(lower.encode('The RIVER')) == 'the river'


def test_tokenizer_file_rebuilds_the_encoding(workspace):
    tokenizer = prepare.train_bpe(corpus(50), 300, lowercase=True)
    tokenizer.save('t.json')
    again = Tokenizer.load('t.json')
    assert again.encode('The old Bridge é') == tokenizer.encode('the old bridge é')
    assert again.decode([again.eot, again.mask, again.pad]) == '<|endoftext|><|mask|><|pad|>'


def test_a_causal_model_needs_no_rows_for_mask_and_pad():
    tokenizer = prepare.make_tokenizer('byte', None, None, False)
    assert tokenizer.ids_needed(causal=True) == 257 and tokenizer.ids_needed(causal=False) == 259


def test_gpt2_keeps_its_own_end_of_text(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257}
    monkeypatch.setattr(prepare.tiktoken, 'get_encoding',
                        lambda name: SimpleNamespace(_mergeable_ranks=ranks))
    tokenizer = prepare.make_tokenizer('gpt2', None, None, False)
    assert tokenizer.encode('the') == [257]
    assert (tokenizer.eot, tokenizer.mask, tokenizer.pad) == (258, 259, 260)


def test_large_vocabularies_take_four_bytes(workspace, script, monkeypatch):
    ranks = [bytes([b]) for b in range(256)] + [b'%06d' % i for i in range(66_000)]
    tokenizer = Tokenizer('big', ranks, r'\d{6}|[\s\S]')
    monkeypatch.setattr(prepare, 'make_tokenizer', lambda *args: tokenizer)
    (workspace / 'a.txt').write_text('065999 ' * 20)
    script(prepare, *BYTES, '--source=a.txt')
    ids = read_tokens(workspace / 'data/text-byte', 'train')
    assert ids.dtype == np.uint32 and ids[1] == 256 + 65_999


@pytest.mark.parametrize('arguments, message', [
    (['--dataset=wiki'], f'takes one of {", ".join(prepare.DATASETS)}; for your own'),
    (['--dataset=text'], '--source=PATH_OR_GLOB'),
    (['--dataset=text', '--source=nothere*'], 'there is no such file'),
    (['--dataset=text', f'--source={"long" * 2000}'], 'there is no such file'),
    (['--dataset=text', '--source=dev.txt'], 'no training file among dev.txt'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=5000'], 'too small for it, it yields'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=100'], 'takes 259 to 1,048,576'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=10000000000000'], 'takes 259 to 1,048,576'),
    ([*BYTES, '--source=a.txt', '--vocab_size=300'], 'has its own vocabulary'),
    ([*BYTES, '--source=a.txt', '--vocab_size=0'], '--vocab_size=0: takes'),
    ([*BYTES, '--source=a.txt', '--seed=-1'], '--seed=-1: takes'),
    (['--dataset=wikitext103'], 'give local files with --source=PATH_OR_GLOB'),
])
def test_refusals_leave_nothing_behind(workspace, script, arguments, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    (workspace / 'dev.txt').write_text('held out')
    with pytest.raises(UserError) as error:
        script(prepare, *arguments)
    assert message in str(error.value)
    assert not (workspace / 'data').exists() or not list((workspace / 'data').iterdir())


TORN = gzip.compress(random.Random(0).randbytes(9000), mtime=0)[:4000]


def table_of(value):
    import pandas
    return pandas.DataFrame({'text': [value] * 3})


@pytest.mark.parametrize('name, write, message', [
    ('a.csv', 'words,label\nx,1\n', "a.csv: no column 'text' among words, label"),
    ('bad.parquet', b'PAR1 no more', 'bad.parquet cannot be read'),
    ('bad.txt.gz', TORN, 'bad.txt.gz cannot be read'),
    ('latin1.txt', 'café'.encode('latin-1') * 50, 'latin1.txt cannot be read (UnicodeDecodeError'),
    ('bad.jsonl', '{"text": "a"}\n{"text": ',
     'bad.jsonl cannot be read (ArrowInvalid: JSON parse error'),
    ('deep.json', '[' * 100_000, 'deep.json cannot be read (ValueError'),
    ('wide.csv', 'text\na, b\nc, d\n', 'wide.csv: its rows have more columns than its header'),
    ('a::b.txt', 'some text', "a::b.txt: the library that reads it takes '::'"),
    ('one.csv', 'text\nx\n', 'val would be empty: the data set has too few documents'),
    ('a.txt', '', 'there is no text in a.txt'),
    ('a.txt.gz', gzip.compress(b'', mtime=0), 'there is no text in a.txt.gz'),
    ('a.txt', ' \n', 'there is no text in a.txt'),
    ('a.jsonl', '', 'there is no text in a.jsonl'),
    ('a.json', '[]', 'there is no text in a.json'),
    ('a.csv', '', 'there is no text in a.csv'),
    ('a.csv', 'text\n', 'there is no text in a.csv'),
    ('a.parquet', lambda path: table_of('x')[:0].to_parquet(path), 'there is no text in a.parquet'),
    ('a.csv', 'text\n1\n2\n', "a.csv: column 'text' holds a value of type int"),
    ('a.jsonl', '{"text": ["x"]}', "a.jsonl: column 'text' holds a value of type list"),
    ('a.jsonl', '{"text": "x"}\n{"text": 2.5}', "column 'text' holds a value of type float"),
    ('a.json', '[1, 2]', "a.json: column 'text' holds a value of type int"),
    ('a.parquet', lambda path: table_of(b'x').to_parquet(path), "holds a value of type bytes"),
    ('a.parquet', lambda path: table_of({'a': 1}).to_parquet(path), 'holds a value of type dict'),
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


def test_one_empty_file_among_others_is_left_out(workspace, script):
    for name, text in (('a.txt', ''), ('b.txt', 'words ' * 50)):
        (workspace / name).write_text(text)
    script(prepare, *BYTES, '--source=*.txt')
    assert len(decode(workspace / 'data/text-byte', 'train')) == 1


def test_a_file_in_the_place_of_the_folder(workspace, script):
    (workspace / 'a.txt').write_text('some words ' * 50)
    (workspace / 'data').write_text('mine')
    with pytest.raises(UserError, match=r'data/text-byte: cannot be written \(Not a directory\)'):
        script(prepare, *BYTES, '--source=a.txt')
    (workspace / 'data').unlink()
    (workspace / 'data').mkdir()
    (workspace / 'data/text-byte').write_text('mine')
    with pytest.raises(UserError, match='data/text-byte: is a file'):
        script(prepare, *BYTES, '--source=a.txt')
    with pytest.raises(UserError, match=r'meta.json: cannot be read \(Not a directory\)'):
        read_tokens('data/text-byte', 'train')
    assert (workspace / 'data/text-byte').read_text() == 'mine'


def test_a_missing_or_changed_corpus_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(prepare, 'WIKI10K', ('no-such-package', *prepare.WIKI10K[1:]))
    with pytest.raises(UserError, match='--dataset=text --source=YOUR_FILES'):
        list(prepare.wiki10k())
    monkeypatch.undo()
    monkeypatch.setattr(prepare, 'WIKI10K', (*prepare.WIKI10K[:2], '0' * 64))
    with pytest.raises(UserError, match='SHA-256 differs'):
        list(prepare.wiki10k())


BYTE_RANKS = [base64.b64encode(bytes([b])).decode() for b in range(256)]


def change(name, **values):
    """Damage of a json file: other values, or with ... none at all. Keys may be `train__tokens`."""
    def damage(folder):
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            *outer, last = key.split('__')
            inner = content[outer[0]] if outer else content
            inner.pop(last) if value is ... else inner.update({last: value})
        (folder / name).write_text(json.dumps(content))
    return damage


def to_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return damage


@pytest.mark.parametrize('damage, message', [
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin: missing'),
    (to_folder('val.bin'), 'val.bin: missing'),
    (lambda folder: (folder / 'train.bin').write_bytes(b'abc'),
     'train.bin: 3 bytes, but meta.json says'),
    (lambda folder: (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[::-1]),
     'train.bin: holds other tokens than were prepared'),
    (lambda folder: (folder / 'meta.json').unlink(), 'no meta.json'),
    (to_folder('meta.json'), 'meta.json: cannot be read (Is a directory)'),
    (lambda folder: (folder / 'meta.json').write_text('{"vocab'), 'meta.json: damaged'),
    (lambda folder: (folder / 'meta.json').write_text('[' * 100_000), 'meta.json: damaged'),
    (lambda folder: (folder / 'meta.json').write_bytes(b'\xff'), 'meta.json: damaged'),
    (lambda folder: (folder / 'meta.json').write_text('[]'), 'content is []: takes a dict'),
    (change('meta.json', dtype='float16'), "dtype is 'float16': takes uint16 or uint32"),
    (change('meta.json', dtype='object'), "dtype is 'object': takes uint16 or uint32"),
    (change('meta.json', vocab_size=0), 'vocab_size is 0: takes'),
    (change('meta.json', vocab_size='259'), "vocab_size is '259': takes"),
    (change('meta.json', lowercase=...), 'lowercase is missing: takes True or False'),
    (change('meta.json', bytes_per_token=float('nan')), 'bytes_per_token is nan: takes'),
    (change('meta.json', source=3), 'source is 3: takes a string or None'),
    (change('meta.json', train=...), 'train is None: takes a dict'),
    (change('meta.json', train__tokens=-2), 'train.tokens is -2: takes'),
    (change('meta.json', val__bytes=...), 'val.bytes is missing: takes'),
    (change('meta.json', val__modified='now'), "val.modified is 'now': takes"),
    (change('meta.json', train__modified=0, train__sha256=...), 'holds other tokens'),
    (change('meta.json', train__modified=10 ** 30, val__tokens=1), 'val.bin: 112 bytes, but'),
    (lambda folder: (folder / 'tokenizer.json').write_text('{}'),
     'tokenizer.json: damaged (name is missing: takes a string)'),
    (lambda folder: (folder / 'tokenizer.json').unlink(), 'no such tokenizer file'),
    (to_folder('tokenizer.json'), 'tokenizer.json: cannot be read (Is a directory)'),
    (change('tokenizer.json', lowercase='no'), "lowercase is 'no': takes True or False"),
    (change('tokenizer.json', ranks={'a': 1}), "ranks is {'a': 1}: takes"),
    (change('tokenizer.json', ranks=['no base64']), 'tokenizer.json: damaged'),
    (change('tokenizer.json', ranks=['AA==']), 'ranks lacks a byte or has a token twice'),
    (change('tokenizer.json', ranks=BYTE_RANKS + BYTE_RANKS[:1]), 'or has a token twice'),
    (change('tokenizer.json', pattern='['), 'tokenizer.json: damaged'),
])
def test_damaged_data_is_refused(workspace, script, damage, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=a.txt')
    folder = workspace / 'data/text-byte'
    damage(folder)
    with pytest.raises(UserError) as error:
        read_tokens(folder, 'train'), read_tokens(folder, 'val')
        Tokenizer.load(folder / 'tokenizer.json')
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_digest_is_checked_once_if_the_time_differs(workspace, script, monkeypatch):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=a.txt')
    checked, digest = [], prepare.hashlib.file_digest
    monkeypatch.setattr(prepare.hashlib, 'file_digest',
                        lambda *args: checked.append(1) or digest(*args))
    read_tokens('data/text-byte', 'train')
    assert not checked
    shutil.copytree('data/text-byte', 'data/copy', copy_function=shutil.copyfile)
    for _ in range(2):
        copy = read_tokens('data/copy', 'train')
        assert (copy == read_tokens('data/text-byte', 'train')).all() and len(checked) == 1


def test_folders_of_older_versions_are_read(workspace, script, capsys):
    """Their meta.json lacks the times and digests that tell what has changed since."""
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, *BYTES, '--source=a.txt')
    folder = workspace / 'data/text-byte'
    change('meta.json', source_state=..., train__modified=..., train__sha256=..., val__modified=...,
           val__sha256=...)(folder)
    (workspace / 'a.txt').write_text('other words')
    os.utime(folder / 'train.bin', (0, 0))
    assert len(read_tokens(folder, 'train')) == 496
    prepare.warn_if_source_changed(folder)
    assert not capsys.readouterr().err


def append_unseen(path, text):
    """Without another time of the file."""
    time = path.stat().st_mtime_ns
    path.write_text(path.read_text() + text)
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize('happens, warned', [
    (lambda path: None, False),
    (lambda path: path.unlink(), False),  # the tokens are there
    (lambda path: path.write_text('other words ' * 60), True),
    (lambda path: os.utime(path, (0, 0)), True),
    (lambda path: append_unseen(path, 'other words'), True),
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
    while not list(data.glob('.text-byte.partial-*/train.bin')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (workspace / 'data/text-byte/train.bin').read_bytes() == before
    script(prepare, *BYTES, '--source=a.txt')  # and sweeps up what the killed run left
    assert [path.name for path in data.iterdir()] == ['text-byte']
    names = ['othermachine-1', f'{platform.node()}-2-1', f'{platform.node()}-{"9" * 30}']
    others = [data / f'.text-byte.partial-{name}' for name in names]
    for other in others:
        other.mkdir()  # another machine may be at work there
    script(prepare, *BYTES, '--source=a.txt')
    assert all(other.exists() for other in others)


def test_ctrl_c_is_one_line(workspace):
    (workspace / 'b.txt').write_text('other words ' * 3_000_000)
    run = subprocess.Popen([sys.executable, REPOSITORY / 'prepare.py', *BYTES, '--source=b.txt'],
                           stderr=subprocess.PIPE, text=True)
    while not list(workspace.glob('data/.text-byte.partial-*')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == 'prepare.py: interrupted\n' and run.returncode == 130
    assert not list((workspace / 'data').iterdir())


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(workspace):
    folder, contents = workspace / 'data/wiki10k-bpe500', []
    for _ in range(2):
        assert shell(REPOSITORY / 'prepare.py', '--vocab_size=500').returncode == 0
        meta = (folder / 'meta.json').read_text()
        for split in ('train', 'val'):  # their times are all that differs
            time = (folder / f'{split}.bin').stat().st_mtime_ns
            assert json.loads(meta)[split]['modified'] == time
            meta = meta.replace(f'"modified": {time}', '"modified": 0', 1)
        contents.append([meta, *((folder / name).read_bytes()
                                 for name in ('train.bin', 'val.bin', 'tokenizer.json'))])
    assert contents[0] == contents[1]
