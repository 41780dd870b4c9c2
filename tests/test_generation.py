"""A cache takes the bytes that it says and changes no logit; sampling draws from the distribution
that its options name."""

import math

import pytest
import torch

import model as m
from model import Cache, sample_token, uniform_numbers
from test_model import EVERY, MLA, VARIANTS, tiny, tokens


@pytest.mark.parametrize('batch, pieces', [
    (3, (16,)), (3, (1,) * 16), (1, (5, 1, 1, 4, 1, 3, 1)), (3, (1, 14, 1))])
@pytest.mark.parametrize('name', EVERY)
def test_cached_logits_are_the_uncached_ones(name, batch, pieces):
    model = tiny(**EVERY[name]).eval()
    idx, cache = tokens(batch, 16), model.init_cache(batch, 16)
    parts, start = [], 0
    with torch.no_grad():
        whole = model(idx)
        for n in pieces:
            parts.append(model(idx[:, start:start + n], cache=cache))
            start += n
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-9
    if 'v4' not in name:  # test_v4.py counts what it keeps
        assert cache.n_bytes() == batch * 16 * m.cache_bytes(model)[0]
    cache.n_tokens = back = 0 if 'v4' in name else 7  # going back forgets what came later
    with torch.no_grad():
        again = model(idx[:, back:9], cache=cache)
    assert (again - whole[:, back:9]).abs().max() < 1e-9


def test_a_cache_is_static():
    """Room is taken once, at the first token."""
    model = tiny(**MLA).eval()
    cache = model.init_cache(2, 16)
    with torch.no_grad():
        model(tokens(2, 3), cache=cache)
        before = [buffer.data_ptr() for buffers in cache.buffers.values() for buffer in buffers]
        for t in range(13):
            model(tokens(2, 1, seed=t), cache=cache)
    assert [buffer.data_ptr() for buffers in cache.buffers.values() for buffer in buffers] == before
    assert cache.n_tokens == 16
    with pytest.raises(ValueError, match='17 tokens, but the cache has room for 16'):
        model(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match='1 sequences, but the cache was made for 2'):
        model(tokens(1, 1), cache=Cache(2, 16))
    with pytest.raises(ValueError, match='block_size is 16'):
        model.init_cache(1, 17)
    with pytest.raises(ValueError, match='an encoder has nothing to cache'):
        tiny(**MLA, causal=False).init_cache(1, 16)


@pytest.mark.parametrize('name', ['mla', 'mla_shared', 'mla_o', 'gla', 'mlra'])
def test_single_tokens_are_absorbed(name, monkeypatch):
    """A step of one token makes no keys and values of the whole context."""
    model = tiny(**VARIANTS[name]).eval()
    cache, rows = model.init_cache(1, 16), []
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, 'forward',
                        lambda self, x: rows.append(x.size(1)) or plain(self, x))
    with torch.no_grad():
        model(tokens(1, 9), cache=cache)
        assert set(rows) == {9}
        rows.clear()
        model(tokens(1, 1), cache=cache)
    assert set(rows) == {1}


@pytest.mark.parametrize('name', [
    'gpt2', 'mla_shared', 'subtract', 'encdec_subtract', 'encdec_mla'])
def test_generation_past_the_window(name):
    """Greedy tokens are those of the plain loop over the last block_size tokens."""
    model, idx = tiny(**EVERY[name]).eval(), tokens(2, 5)
    expected = idx
    with torch.no_grad():
        for _ in range(24):
            token = model(expected[:, -16:])[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, token), dim=1)
    assert torch.equal(model.generate(idx, 24, temperature=0), expected)
    long = tokens(2, 30)
    from_long = model.generate(long, 3, temperature=0)[:, 30:]
    from_its_window = model.generate(long[:, -16:], 3, temperature=0)[:, 16:]
    assert torch.equal(from_long, from_its_window)


def test_several_samples_of_one_prompt_and_seeds():
    model = tiny(**MLA).eval()
    idx = tokens(1, 4).expand(5, -1)
    out = model.generate(idx, 8, seed=3)
    assert len({tuple(row.tolist()) for row in out}) == 5
    for i, row in enumerate(out):  # beside others a sample is what it is alone
        assert torch.equal(row, model.generate(idx[:1], 8, seed=3 + i)[0])
    plain, u = idx, uniform_numbers(5, 20, 3)  # the same draws without a cache; the first 8 of 20
    with torch.no_grad():
        for n in range(8):
            token = sample_token(model(plain)[:, -1], u[:, n])
            plain = torch.cat((plain, token[:, None]), dim=1)
    assert torch.equal(out, plain)
    torch.manual_seed(5)
    free = model.generate(idx, 8)
    assert not torch.equal(free, model.generate(idx, 8))  # goes on with torch's own generator
    torch.manual_seed(5)
    assert torch.equal(free, model.generate(idx, 8))


def test_what_is_generated_can_be_trained_on():
    model = tiny(**MLA)
    out = model.generate(tokens(2, 4), 8)
    model(out[:, :-1], out[:, 1:])['loss'].backward()
    first, = model.stream(tokens(2, 4), 1)
    model(first[:, None], first[:, None])['loss'].backward()


def test_stops_at_the_end_of_text():
    model = tiny(**MLA).eval()
    idx = tokens(4, 3)
    free = model.generate(idx, 12, seed=0)
    stop = free[0, 5].item()
    out = model.generate(idx, 12, seed=0, stop=stop)
    assert (out[0, 5:] == stop).all()
    for row, same in zip(out, free):
        ends = (row[3:] == stop).nonzero()
        n = 3 + (ends[0].item() + 1 if len(ends) else len(row) - 3)
        assert torch.equal(row[:n], same[:n]) and (row[n:] == stop).all()
    one = model.generate(idx[:1], 12, seed=0, temperature=0)
    assert model.generate(idx[:1], 12, temperature=0, stop=one[0, 4].item()).size(1) <= 5


def test_sampling_draws_from_its_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -9.0])
    p = (logits / 0.7).softmax(-1)
    kept = {'all': [0, 1, 2, 3, 4], 'top_k': [0, 1], 'top_p': [0, 1]}
    assert p[0] < 0.8 <= p[0] + p[1]  # so that a nucleus of 0.8 is two tokens
    for name, options in (('all', {}), ('top_k', dict(top_k=2)), ('top_p', dict(top_p=0.8))):
        u = (torch.arange(20_000) + 0.5) / 20_000
        draws = sample_token(logits.expand(20_000, -1), u, 0.7, **options)
        share = torch.bincount(draws, minlength=5) / 20_000
        wanted = torch.zeros(5)
        wanted[kept[name]] = p[kept[name]] / p[kept[name]].sum()
        assert (share - wanted).abs().max() < 1e-4, name
    ends = torch.tensor([0.0, 1 - 2 ** -24])  # of what torch.rand draws
    for options in ({}, dict(top_k=99), dict(top_p=1.0), dict(top_p=1e-9), dict(top_p=1e-300)):
        few = 'top_p' in options and options['top_p'] < 1  # but never nothing
        assert sample_token(logits.expand(2, -1), ends, **options).tolist() == [0, 0 if few else 4]
    assert sample_token(logits[None], ends[1:], 0).item() == 0
    with pytest.raises(ValueError, match='temperature=-1'):
        sample_token(logits[None], ends[:1], -1)
