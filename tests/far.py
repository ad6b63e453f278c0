"""A second device made of the CPU: what meets the wrong one, or makes the host wait, is found.

with Far() as far:                 # `torch.device('meta')` then holds real numbers
    y = model(x.to(far.device))    # RuntimeError where a tensor of the CPU meets one from there
far.waits                          # where the host had to wait for the device: (operator, line)
"""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
META = torch.device('meta')
# they read the numbers of a tensor, or size their result by them
READS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal'}
READS |= {'_unique2', 'unique_dim', 'unique_consecutive', 'repeat_interleave', 'bincount'}
# of two devices at once, as on a GPU
BOTH = {'copy_', '_to_copy', 'set_', '_has_compatible_shallow_copy_type'}


class FarTensor(torch.Tensor):
    "A tensor that says it is on 'meta' and keeps its numbers on the CPU."

    @staticmethod
    def __new__(cls, inner):
        how = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        how |= dict(dtype=inner.dtype, layout=inner.layout, device=META)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **how)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f'FarTensor({list(self.shape)}, {self.dtype})'

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Far.current.run(func, args, kwargs or {})


def _each(function, value):
    "`function` of every tensor in lists and tuples"
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(_each(function, v) for v in value) if type(value) in (list, tuple) else value


def _line():
    "The line of the package that is at work"
    frame = sys._getframe(2)
    while frame.f_back and '/lora_recycle/' not in frame.f_code.co_filename:
        frame = frame.f_back
    code = frame.f_code
    return f'{code.co_filename.split("/lora_recycle/")[-1]}:{frame.f_lineno} {code.co_name}'


class Far(TorchDispatchMode):
    "The device; inside, `torch.tensor(..., device='meta')` keeps its numbers too"

    current = None
    device = META

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else each operator goes through torch's compiler, which is loaded for it

    def __enter__(self):
        self.waits = Counter()
        self._tensor = torch.tensor
        torch.tensor = self._make_tensor
        Far.current = self
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self._tensor
        Far.current = None
        return super().__exit__(*error)

    def _make_tensor(self, data, *, device=None, **how):
        "As `torch.tensor`, which leaves the numbers out on 'meta'; it copies, and waits"
        made = self._tensor(data, **how)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        "One operator"
        name = func.overloadpacket.__name__
        if func is aten._fused_sdp_choice.default:
            return 0  # attention written out: the fused kernels are the CPU's own
        tensors = []
        _each(tensors.append, (*args, *kwargs.values()))
        there = [t for t in tensors if isinstance(t, FarTensor)]
        target = kwargs.get('device')
        goes = there if target is None else torch.device(target) == META
        self._check(func, name, args, kwargs, tensors, there)
        if name == '_to_copy' and target is not None and bool(there) != bool(goes):
            if not kwargs.get('non_blocking'):
                self.waits[f'copy at {_line()}'] += 1
        if name == 'copy_' and 0 < len(there) < 2 and not (args[2:] or kwargs.get('non_blocking')):
            self.waits[f'copy at {_line()}'] += 1
        if there and name in READS:
            self.waits[f'{name} at {_line()}'] += 1
        known = {id(t.inner): t for t in there}
        bare = lambda t: t.inner if isinstance(t, FarTensor) else t
        kwargs = {k: _each(bare, v) for k, v in kwargs.items()}
        if target is not None:
            kwargs['device'] = torch.device('cpu')
        made = func(*_each(bare, args), **kwargs)
        # what was changed in place stays the tensor that it was
        wrap = lambda t: known[id(t)] if id(t) in known else FarTensor(t)
        return _each(wrap, made) if goes else made

    def _check(self, func, name, args, kwargs, tensors, there):
        "RuntimeError where devices are mixed as a GPU would refuse"
        if not there and kwargs.get('device') != META:
            return
        if isinstance(kwargs.get('generator'), torch.Generator):
            raise RuntimeError(f'{func}: the generator is of the CPU, at {_line()}')
        if name in BOTH or not there:
            return
        strange = [t for t in tensors if not isinstance(t, FarTensor) and t.ndim]
        if name in ('index', 'index_put', 'index_put_', '_index_put_impl_'):
            if isinstance(args[0], FarTensor):
                indices = [t for t in args[1] if t is not None]
                if any(t.dtype == torch.bool for t in indices):
                    self.waits[f'{name} by truth at {_line()}'] += 1
                elif any(not isinstance(t, FarTensor) for t in indices):
                    self.waits[f'{name} copies its index at {_line()}'] += 1
                strange = [t for t in args[2:] if isinstance(t, torch.Tensor) and t.ndim]
                strange = [t for t in strange if not isinstance(t, FarTensor)]
        if strange:
            shapes = [list(t.shape) for t in strange]
            raise RuntimeError(f'{func}: tensors {shapes} are on the CPU, at {_line()}')
