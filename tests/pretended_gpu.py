"""A pretended GPU for machines without one: tensors that say `cuda:0`, lie in the host's memory, and refuse to meet the
host's own.

It shows what a GPU would refuse, operands on two devices, and what the host would wait for, values that it reads.
Kernels, streams, memory and speed it cannot show. It changes torch for the whole process, so it is for one of its own,
in which `load` comes before anything else that imports torch.
"""

import contextlib
import functools
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile what stands for CUDA's own part of torch: seconds, with the compiler that torch.compile needs too."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # which would else be imported before it
    found = folder / "pretended_hooks.so"
    includes = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", SOURCE, "-o", found, *(f"-I{path}" for path in includes)]
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    subprocess.run([*command, *libraries], check=True)
    return found


def load(hooks: Path) -> None:
    """Make torch take this machine for one with a GPU, as far as that needs no kernel."""
    spec = importlib.util.spec_from_file_location("pretended_hooks", hooks)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

    import torch

    torch.inference_mode = _Inference
    torch.is_inference_mode_enabled = lambda: _Inference.is_on
    torch.autograd.set_multithreading_enabled(False)  # there is no thread for the device

    run_backward = torch.autograd.graph._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with pretended():  # no mode is on where autograd calls Python
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = run
    kernels = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
        return _types()[0](torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
        return _types()[0](torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    kernels.impl("empty.memory_format", empty, "CUDA")  # which composed operations make their own tensors by
    kernels.impl("empty_strided", empty_strided, "CUDA")
    _kept.append(kernels)


_kept: list[Any] = []  # which torch forgets with its last reference
waits: list[str] = []  # what the host has waited for, an operation's name each


class _Inference(contextlib.ContextDecorator):
    """`no_grad` that says it is inference mode, in whose true form no view of a wrapped tensor can be made."""

    is_on = False

    def __init__(self, mode: bool = True) -> None:
        self._mode, self._before = mode, []

    def _recreate_cm(self) -> "_Inference":
        return _Inference(self._mode)

    def __enter__(self) -> None:
        import torch

        self._before.append((_Inference.is_on, torch.is_grad_enabled()))
        torch.set_grad_enabled(not self._mode and (_Inference.is_on or torch.is_grad_enabled()))
        _Inference.is_on = self._mode

    def __exit__(self, *_: object) -> None:
        import torch

        _Inference.is_on, has_grad = self._before.pop()
        torch.set_grad_enabled(has_grad)


def pretended() -> contextlib.AbstractContextManager[object]:
    """Within it `cuda` is a device to make tensors on and to move them to."""
    return _types()[1]()


def moved(module: Any) -> Any:
    """A module with its weights on the device."""
    import torch

    on_gpu = _types()[0]
    made: dict[int, Any] = {}  # a head may be the embedding
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                new = torch.nn.Parameter(on_gpu(weight.detach().clone()))
                part._parameters[name] = made.setdefault(id(weight), new)
        for name, buffer in part._buffers.items():
            part._buffers[name] = on_gpu(buffer.clone())
    return module


def host(tensor: Any) -> Any:
    """A device tensor's values, looked at from outside."""
    return tensor.held


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """What the host waits for meanwhile."""
    waits.clear()
    yield waits


@functools.cache
def _types() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The tensor's class and the mode, which can be made once torch may be imported."""
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves, tree_map

    gpu = torch.device("cuda", 0)
    reads = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}

    def is_gpu(device: Any) -> bool:
        return device is not None and torch.device(device).type == "cuda"

    class OnGpu(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls: Any, held: Tensor) -> Any:
            layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
            made = Tensor._make_wrapper_subclass(cls, held.size(), device=gpu, **layout)
            made.held = held
            return made

        def __init__(self, held: Tensor) -> None:
            """Nothing more."""

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            hosts = [one for one in given if not isinstance(one, OnGpu) and one.dim()]

            def held(one: Any) -> Any:
                return one.held if isinstance(one, OnGpu) else one

            on_gpu = any(isinstance(one, OnGpu) for one in given)
            if name == "_to_copy":
                on_gpu = is_gpu(kwargs["device"]) if kwargs.get("device") is not None else on_gpu
                if isinstance(args[0], OnGpu) and not on_gpu:
                    waits.append("to the host")
                copy = torch.empty_like(held(args[0]), dtype=kwargs.get("dtype"), device="cpu").copy_(held(args[0]))
                return OnGpu(copy) if on_gpu else copy
            if name == "copy_":
                if isinstance(args[1], OnGpu) and not isinstance(args[0], OnGpu):
                    waits.append("to the host")
                hosts = []
            if name in ("index", "index_put", "index_put_"):
                indices = [one for one in args[1] if one is not None]
                if any(one.dtype == torch.bool for one in indices):
                    waits.append("a mask's count")
                hosts = [one for one in hosts if all(one is not index for index in indices)]  # those are sent
            if name in reads or (name == "repeat_interleave" and kwargs.get("output_size") is None):
                waits.append(name)
            if hosts:
                shapes = [(one.device.type, tuple(one.shape)) for one in given]
                raise RuntimeError(f"{function}: operands on two devices: {shapes}")
            if kwargs.get("device") is not None:
                on_gpu, kwargs["device"] = is_gpu(kwargs["device"]), torch.device("cpu")
            out = function(*tree_map(held, args), **tree_map(held, kwargs))
            for one in given:
                if out is held(one):  # done in place
                    return one
            return tree_map(lambda one: OnGpu(one) if on_gpu and isinstance(one, Tensor) else one, out)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        """As a GPU's kernels take it: a mask on the device, of the queries' type or bool."""
        if options.get("enable_gqa") and k.shape[1] != q.shape[1]:
            k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        if not q.dtype == k.dtype == v.dtype:
            raise RuntimeError(f"attention: types {q.dtype}, {k.dtype}, {v.dtype}")
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if options.get("is_causal"):
            attn_mask = OnGpu(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            if attn_mask.dtype != q.dtype:
                raise RuntimeError(f"attention: a mask of {attn_mask.dtype} for {q.dtype}")
            scores = scores + attn_mask
        return scores.softmax(-1).nan_to_num() @ v

    class Pretended(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
            if name == "scaled_dot_product_attention" and isinstance(args[0], OnGpu):
                with torch._C.DisableTorchFunction():
                    return attention(*args, **kwargs)
            if name == "to" and not isinstance(args[0], OnGpu):
                said = [one for one in [*args[1:], kwargs.get("device")] if isinstance(one, (str, torch.device))]
                said += [one.device for one in args[1:] if isinstance(one, Tensor)]
                if any(map(is_gpu, said)):
                    types_said = [one for one in [*args[1:], kwargs.get("dtype")] if isinstance(one, torch.dtype)]
                    return OnGpu(args[0].detach().clone().to(*types_said))
            elif name != "to" and is_gpu(kwargs.get("device")):
                return OnGpu(function(*args, **{**kwargs, "device": torch.device("cpu")}))
            return function(*args, **kwargs)

    return OnGpu, Pretended
