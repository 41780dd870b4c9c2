"""The CUDA path on a machine without a GPU: fake tensors have a device, a precision and a shape,
but no numbers. Every config runs as on a GPU, under autocast to bfloat16."""

import contextlib
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import REPOSITORY
from model import Block, ChannelBlock, make_model
from train import read_options

CONFIGS = sorted(path.stem for path in (REPOSITORY / 'config').glob('[!_]*.py'))
SHRUNK = ['--vocab_size=300', '--n_layer=2', '--block_size=96']
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@pytest.fixture(scope='module')
def fake_gpu(tmp_path_factory):
    """Lets fake tensors be on 'cuda'. A build of torch for CPUs does not know how to switch between
    GPUs, which even fake tensors do in places: this teaches it to do nothing."""
    if torch.version.cuda is None:
        folder, torch_folder = tmp_path_factory.mktemp('guard'), Path(torch.__file__).parent
        (folder / 'guard.cpp').write_text(GUARD)
        subprocess.run(['g++', '-std=c++20', '-shared', '-fPIC', folder / 'guard.cpp',
                        '-o', folder / 'guard.so', f'-I{torch_folder}/include',
                        f'-L{torch_folder}/lib', '-lc10'], check=True)
        ctypes.CDLL(folder / 'guard.so')


@contextlib.contextmanager
def autocast():
    """torch.autocast('cuda', torch.bfloat16), which switches itself off where there is no GPU."""
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.clear_autocast_cache()


class EverythingOnCuda(TorchDispatchMode):
    """Fails at an operation that makes a tensor elsewhere: the GPU would wait for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == 'cuda', f'{operation} is computed on the CPU'
        return result


def watch_streams(model):
    """Fails where a block gets or gives a residual stream that is not in float32. Returns how many
    blocks there are."""
    def check(block, tensors, what):
        for tensor in tensors:
            assert tensor.dtype == torch.float32, f'{names[block]} {what} {tensor.dtype}'

    names = {module: name for name, module in model.named_modules()
             if isinstance(module, (Block, ChannelBlock))}
    for block in names:
        block.register_forward_pre_hook(lambda block, streams: check(block, streams, 'gets'))
        block.register_forward_hook(lambda block, _, out: check(block, [out], 'gives'))
    return len(names)


@pytest.mark.parametrize('name, more', [
    *((name, []) for name in CONFIGS),
    ('decoder', ['--vocab_rank=8']),
    ('grouped', ['--compress=perceiver']),
    ('decoder_v4', ['--layer_kinds=csa hca', '--window=16', '--hca_group=16', '--index_topk=4']),
])
def test_every_config_on_cuda(fake_gpu, name, more):
    """Training, evaluation, and for causal models generation: nothing is computed on the CPU,
    residual streams, losses and the sums over rows of the gradient are in float32, logits in
    bfloat16."""
    recipe, options, _ = read_options([f'{REPOSITORY}/config/{name}.py', *SHRUNK, *more])
    with FakeTensorMode():
        with torch.device('cuda'):  # only to build it: what `forward` makes has to say where
            model = make_model(recipe.arch, **options)
            idx = torch.zeros(2, model.config.block_size, dtype=torch.long)
        assert watch_streams(model) >= 2
        positions = None if model.config.causal else idx[:, :19]
        targets = idx if positions is None else positions
        with EverythingOnCuda(), autocast():
            out = model(idx, targets, positions)
            assert {value.dtype for value in out.values()} == {torch.float32}
            dx, dweight, _ = out.get('cross_entropy', out['loss']).grad_fn.saved_tensors
            assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
            with torch.no_grad():
                out = model.eval()(idx, targets, positions)
                assert [value.dtype for value in out.values()] == 2 * [torch.float32]
                if model.config.causal:
                    cache = model.init_cache(2, model.config.block_size)
                    for part in (idx[:, :5], idx[:, 5:6], idx[:, 6:]):
                        assert model(part, cache=cache).dtype == torch.bfloat16
