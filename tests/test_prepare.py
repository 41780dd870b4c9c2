"""prepare.py: documents, splits, tokenizers, token files, and what it refuses."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
from config import UserError
from conftest import REPOSITORY, corpus, shell
from prepare import Tokenizer, is_title, join_articles, read_tokens

WIKITEXT = ['\n', ' = One = \n', '\n', ' First . \n', '\n', ' = = Section = = \n', ' a = b = c \n', '\n', ' = E = mc2 = \n',
            '\n', ' Second . \n']


def decode(folder, split):
    tokenizer = Tokenizer.load(folder / 'tokenizer.json')
    return tokenizer.decode(read_tokens(folder, split)).split('<|endoftext|>')[1:]


def write_files(folder, documents):
    """The same documents in every format that --source reads, two files each."""
    import pandas
    folder.mkdir()
    for part, texts in (('a', documents[::2]), ('b', documents[1::2])):
        table = pandas.DataFrame({'id': range(len(texts)), 'text': texts})
        table.to_parquet(folder / f'{part}.parquet')
        table.to_csv(folder / f'{part}.csv', index=False)
        table.to_json(folder / f'{part}.jsonl', orient='records', lines=True)
        table.assign(text=[text.strip() for text in texts]).to_csv(folder / f'{part}.tsv', sep='\t', index=False,
                                                                   quoting=csv.QUOTE_NONE)
    for path in list(folder.iterdir()):
        if path.suffix != '.parquet':
            path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))


def test_headings_of_wikitext():
    assert [is_title(line) for line in (' = One = \n', '= One =', ' = = Two = = \n', ' = = = Three = = = ', 'a = b', ' = x')
            ] == [True, True, False, False, False, False]
    assert list(join_articles(WIKITEXT)) == ['\n = One = \n\n First . \n\n = = Section = = \n a = b = c \n\n',
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
        assert ids[0] == 597 and (ids == 597).sum() == meta[split]['documents']  # <|endoftext|> starts each document
        assert ids.max() == 597  # <|mask|> and <|pad|> are never in the data
    documents = decode(folder, 'train') + decode(folder, 'val')
    assert sorted(documents) == sorted(prepare.wiki10k())
    assert sum(len(text.encode()) for text in documents) == meta['train']['bytes'] + meta['val']['bytes']
    assert 'CC BY-SA' in capsys.readouterr().out


def test_the_seed_chooses_what_is_held_out(workspace, script):
    write_files(workspace / 'files', corpus(200))
    chosen = []
    for seed in (1, 1, 2):
        script(prepare, '--dataset=text', '--source=files/*.csv', '--tokenizer=byte', f'--seed={seed}')
        chosen.append((workspace / 'data/text-byte/val.bin').read_bytes())
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'tsv', 'jsonl', 'csv.gz', 'tsv.gz', 'jsonl.gz'])
def test_tables_are_rows_of_documents(workspace, script, kind):
    documents = ['a "quoted", text é\n'] + corpus(60)
    write_files(workspace / 'files', documents)
    script(prepare, '--dataset=text', f'--source=files/*.{kind}', '--tokenizer=byte')
    found = decode(workspace / 'data/text-byte', 'train') + decode(workspace / 'data/text-byte', 'val')
    assert sorted(text.strip() for text in found) == sorted(text.strip() for text in documents)


def test_plain_text_keeps_every_byte_and_holds_out_the_last_tenth(workspace, script):
    text = 'Tab\there, no newline at the end, é and \u2028 too. ' * 40
    (workspace / 'a.txt').write_bytes(text.encode())
    (workspace / 'b.txt.gz').write_bytes(gzip.compress(text.encode()))
    for source in ('a.txt', 'b.txt.gz'):
        script(prepare, '--dataset=text', f'--source={source}', '--tokenizer=byte')
        (train,), (val,) = (decode(workspace / 'data/text-byte', split) for split in ('train', 'val'))
        assert train + val == text and len(val) == -(-len(text) // 10)


def test_a_long_file_is_encoded_in_pieces(workspace, script, monkeypatch):
    text = ''.join(corpus(300))
    assert list(prepare.pieces('ab\n' * 9, 7)) == ['ab\nab\n'] * 4 + ['ab\n'] and list(prepare.pieces('x' * 9, 4)) == ['x' * 9]
    (workspace / 'a.txt').write_text(text)
    cut = prepare.pieces
    monkeypatch.setattr(prepare, 'pieces', lambda text: cut(text, 1000))
    script(prepare, '--dataset=text', '--source=a.txt', '--vocab_size=300')
    (train,), (val,) = (decode(workspace / 'data/text-bpe300', split) for split in ('train', 'val'))
    assert train + val == text


def test_wikitext_from_gzip_lines_with_its_own_validation_file(workspace, script):
    (workspace / 'train_00.txt.gz').write_bytes(gzip.compress(''.join(WIKITEXT).encode()))
    (workspace / 'validation_1.txt.gz').write_bytes(gzip.compress(b'= Held out =\n\nText .\n'))
    (workspace / 'test_1.txt').write_bytes(b'never read')
    script(prepare, '--dataset=wikitext103', '--source=*.t*', '--tokenizer=byte', '--lowercase=True')
    folder = workspace / 'data/wikitext103-byte-lower'
    assert decode(folder, 'train') == [article.lower() for article in join_articles(WIKITEXT)]
    assert decode(folder, 'val') == ['= held out =\n\ntext .\n']


def test_sst2_sentences(workspace, script):
    for name, rows in (('train', 9), ('dev', 3)):
        (workspace / f'{name}.tsv').write_text('sentence\tlabel\n' + ''.join(f'"a film {i} \t1\n' for i in range(rows)))
    script(prepare, '--dataset=sst2', '--source=*.tsv', '--tokenizer=byte')
    assert decode(workspace / 'data/sst2-byte', 'train') == [f'"a film {i} ' for i in range(9)]
    assert len(decode(workspace / 'data/sst2-byte', 'val')) == 3


def test_the_hub_is_asked_for_the_right_thing(workspace, script, monkeypatch):
    """There is no hub here: load_dataset is replaced, and what it is asked for is held against the data sets' names."""
    import datasets
    asked = []

    def load_dataset(path, name=None, split=None, streaming=None):
        asked.append((path, name, split, streaming))
        column = 'sentence' if 'sst2' in path else 'text'
        return datasets.Dataset.from_dict({column: WIKITEXT if 'wikitext' in path else corpus(500)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    for dataset in ('wikitext103', 'wikipedia', 'sst2'):
        script(prepare, f'--dataset={dataset}', '--tokenizer=byte')
    assert set(asked) == {('Salesforce/wikitext', 'wikitext-103-raw-v1', 'train', True),
                          ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'validation', True),
                          ('wikimedia/wikipedia', '20231101.en', 'train', True),
                          ('stanfordnlp/sst2', None, 'train', True), ('stanfordnlp/sst2', None, 'validation', True)}
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
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text
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


def test_gpt2_keeps_its_own_end_of_text(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257}
    monkeypatch.setattr(prepare.tiktoken, 'get_encoding', lambda name: SimpleNamespace(_mergeable_ranks=ranks))
    tokenizer = prepare.make_tokenizer('gpt2', None, None, False)
    assert tokenizer.encode('the') == [257] and (tokenizer.eot, tokenizer.mask, tokenizer.pad) == (258, 259, 260)


def test_large_vocabularies_take_four_bytes(workspace, script, monkeypatch):
    ranks = [bytes([b]) for b in range(256)] + [b'%06d' % i for i in range(66_000)]
    monkeypatch.setattr(prepare, 'make_tokenizer', lambda *args: Tokenizer('big', ranks, r'\d{6}|[\s\S]'))
    (workspace / 'a.txt').write_text('065999 ' * 20)
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')
    ids = read_tokens(workspace / 'data/text-byte', 'train')
    assert ids.dtype == np.uint32 and ids[1] == 256 + 65_999


@pytest.mark.parametrize('arguments, message', [
    (['--dataset=wiki'], 'takes wiki10k, wikitext103, wikipedia, sst2, or text'),
    (['--dataset=text'], '--source=PATH_OR_GLOB'),
    (['--dataset=text', '--source=nothere*'], 'there is no such file'),
    (['--dataset=text', '--source=dev.txt'], 'no training file among dev.txt'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=5000'], 'too small for it, it yields'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=100'], 'needs at least 259'),
    (['--dataset=text', '--source=a.txt', '--vocab_size=300', '--tokenizer=byte'], 'has its own vocabulary'),
    (['--dataset=text', '--source=a.csv', '--tokenizer=byte'], "no column 'text' among words, label"),
    (['--dataset=text', '--source=bad.parquet', '--tokenizer=byte'], 'bad.parquet cannot be read'),
    (['--dataset=text', '--source=bad.txt.gz', '--tokenizer=byte'], 'bad.txt.gz cannot be read'),
    (['--dataset=text', '--source=latin1.txt', '--tokenizer=byte'], 'latin1.txt cannot be read'),
    (['--dataset=text', '--source=one.csv', '--tokenizer=byte'], 'val would be empty'),
    (['--dataset=wikitext103'], 'give local files with --source=PATH_OR_GLOB'),
])
def test_refusals_leave_nothing_behind(workspace, script, arguments, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    (workspace / 'dev.txt').write_text('held out')
    (workspace / 'a.csv').write_text('words,label\nx,1\n')
    (workspace / 'one.csv').write_text('text\nx\n')
    (workspace / 'bad.parquet').write_bytes(b'PAR1 no more')
    (workspace / 'bad.txt.gz').write_bytes(gzip.compress(os.urandom(9000))[:4000])
    (workspace / 'latin1.txt').write_bytes('café'.encode('latin-1') * 50)
    with pytest.raises(UserError) as error:
        script(prepare, *arguments)
    assert message in str(error.value)
    assert not (workspace / 'data').exists() or not list((workspace / 'data').iterdir())


def test_a_missing_or_changed_corpus_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(prepare, 'WIKI10K', ('no-such-package', *prepare.WIKI10K[1:]))
    with pytest.raises(UserError, match='--dataset=text --source=YOUR_FILES'):
        list(prepare.wiki10k())
    monkeypatch.undo()
    monkeypatch.setattr(prepare, 'WIKI10K', (*prepare.WIKI10K[:2], '0' * 64))
    with pytest.raises(UserError, match='SHA-256 differs'):
        list(prepare.wiki10k())


@pytest.mark.parametrize('damage, message', [
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin: missing'),
    (lambda folder: (folder / 'train.bin').write_bytes(b'abc'), 'train.bin: 3 bytes, but meta.json says'),
    (lambda folder: (folder / 'meta.json').unlink(), 'no meta.json'),
    (lambda folder: (folder / 'meta.json').write_text('{"vocab'), 'meta.json: damaged'),
    (lambda folder: (folder / 'tokenizer.json').write_text('{}'), 'damaged tokenizer file'),
    (lambda folder: (folder / 'tokenizer.json').unlink(), 'no such tokenizer file'),
])
def test_damaged_data_is_refused(workspace, script, damage, message):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')
    folder = workspace / 'data/text-byte'
    damage(folder)
    with pytest.raises(UserError) as error:
        read_tokens(folder, 'train'), read_tokens(folder, 'val'), Tokenizer.load(folder / 'tokenizer.json')
    assert message in str(error.value)


def test_an_interrupted_run_leaves_the_old_data_set(workspace, script):
    (workspace / 'a.txt').write_text('some words ' * 50)
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')
    before = (workspace / 'data/text-byte/train.bin').read_bytes()
    (workspace / 'b.txt').write_text('other words ' * 3_000_000)
    run = subprocess.Popen([sys.executable, REPOSITORY / 'prepare.py', '--dataset=text', '--source=b.txt',
                            '--tokenizer=byte'], stderr=subprocess.PIPE, text=True)
    while not list((workspace / 'data').glob('.text-byte.partial-*/train.bin')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (workspace / 'data/text-byte/train.bin').read_bytes() == before
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')  # and sweeps up what the killed run left
    assert [path.name for path in (workspace / 'data').iterdir()] == ['text-byte']
    other = workspace / 'data' / '.text-byte.partial-othermachine-1'
    other.mkdir()  # may be at work there
    script(prepare, '--dataset=text', '--source=a.txt', '--tokenizer=byte')
    assert other.exists()


def test_ctrl_c_is_one_line(workspace):
    (workspace / 'b.txt').write_text('other words ' * 3_000_000)
    run = subprocess.Popen([sys.executable, REPOSITORY / 'prepare.py', '--dataset=text', '--source=b.txt',
                            '--tokenizer=byte'], stderr=subprocess.PIPE, text=True)
    while not list(workspace.glob('data/.text-byte.partial-*')) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == 'prepare.py: interrupted\n' and run.returncode == 130
    assert not list((workspace / 'data').iterdir())


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(workspace):
    contents = []
    for _ in range(2):
        assert shell(REPOSITORY / 'prepare.py', '--vocab_size=500').returncode == 0
        contents.append([(workspace / 'data/wiki10k-bpe500' / name).read_bytes()
                         for name in ('train.bin', 'val.bin', 'tokenizer.json', 'meta.json')])
    assert contents[0] == contents[1]
