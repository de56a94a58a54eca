"""Stock megatron-core on a CPU over gloo.

megatron-core names CUDA in a few dozen places. Each name that our paths reach is replaced, listed by `replacements()`
with its reason, and put back by `uninstall()`. Calls that do not name a CUDA device go to the untouched function, so
other libraries see no difference. Where torch has a GPU the backend refuses: there the real thing runs.

Source: measured against megatron-core 0.19.2; `tests/runtime/test_cpu_backend.py` notices a name that is missing here.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, override

import torch
import torch.utils._device

from megatron_7b import core_import
from megatron_7b.errors import ConfigError
from megatron_7b.runtime.cpu.kernels import is_supported, rotary_embedding
from megatron_7b.runtime.cpu.vector_math import settle_vector_functions
from megatron_7b.runtime.long_sums import l2_norm
from megatron_7b.runtime.machine.graph_safe_generators import DefaultGenerator
from megatron_7b.runtime.weight_gradients import accumulate_weight_gradient, embedding

_CPU = torch.device("cpu")
_FACTORIES = (
    "zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "linspace", "eye", "rand", "randn", "randint",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "empty_strided",
)  # fmt: skip


@dataclass(frozen=True)
class Replacement:
    """One replaced name: where it is, what is there now, and why."""

    owner: Any
    name: str
    value: Any
    reason: str


class CpuStream:
    """Stands for `torch.cuda.Stream`: work on a CPU is in order already, so there is nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, _stream: object) -> None:
        """Do nothing."""

    def wait_event(self, _event: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self, event: object = None) -> object:
        """Return the event, or a new one."""
        return event if event is not None else CpuEvent()


class CpuEvent:
    """Stands for `torch.cuda.Event`: it has always happened."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def record(self, _stream: object = None) -> None:
        """Do nothing."""

    def wait(self, _stream: object = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True."""
        return True


_STREAM = CpuStream()


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: a CUDA device becomes the CPU, every other call is passed on as it came."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _tensor_to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _same(self: Any, *_args: object, **_kwargs: object) -> Any:
    return self


def _set_device(_device: object) -> None:
    return None


def _synchronize(_device: object = None) -> None:
    return None


@contextlib.contextmanager
def _stream_context(_stream: object) -> Iterator[None]:
    yield


_GENERATOR = DefaultGenerator()


class _DefaultGenerators(tuple[DefaultGenerator, ...]):
    """Stands for `torch.cuda.default_generators`, also if asked with what `current_device` returns here."""

    __slots__ = ()

    @override
    def __getitem__(self, _index: object) -> DefaultGenerator:  # type: ignore[override]
        return _GENERATOR


def _get_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _get_core_rng_state(
    _device: object = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor | torch.Generator:
    if not graph_safe:
        return torch.get_rng_state()
    return _GENERATOR.clone_state() if clone else _GENERATOR.graphsafe_get_state()


def _set_core_rng_state(
    new_state: torch.Tensor | torch.Generator, _device: object = -1, graph_safe: bool = False
) -> None:
    assert isinstance(new_state, torch.Generator) is graph_safe
    if isinstance(new_state, torch.Generator):
        _GENERATOR.graphsafe_set_state(new_state)
    else:
        torch.set_rng_state(new_state)


def _rotary_embedding(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def apply(t: torch.Tensor, freqs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        plain = not any(kwargs.get(name) for name in ("rotary_interleaved", "mla_rotary_interleaved"))
        plain = plain and kwargs.get("mscale", 1.0) == 1.0 and kwargs.get("multi_latent_attention") is None
        same_for_all = freqs.shape[1:-1] == (1, 1) and freqs.shape[0] == t.shape[0]
        if plain and same_for_all and t.dim() == 4 and is_supported(t) and not freqs.requires_grad:
            return rotary_embedding(t, freqs)
        return original(t, freqs, **kwargs)

    return apply


def _multi_tensor_l2_norm(
    _chunk_size: int, _overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], _per_tensor: bool
) -> tuple[torch.Tensor, None]:
    return torch.tensor([l2_norm(tensor for tensors in tensor_lists for tensor in tensors)]), None


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _seed(seed: int) -> None:
    # torch.manual_seed would also seed the (absent) CUDA generators and go through torch.cuda again.
    torch.default_generator.manual_seed(int(seed))


def replacements() -> tuple[Replacement, ...]:
    """Return every name that `install` replaces, with its reason."""
    cuda = torch.cuda
    factories = tuple(
        Replacement(torch, name, _on_cpu(getattr(torch, name)), "megatron-core allocates with device='cuda'")
        for name in _FACTORIES
    )
    return (
        *factories,
        Replacement(torch.Tensor, "cuda", _same, "moves of batches, counters and tied weights"),
        Replacement(torch.Tensor, "to", _tensor_to(torch.Tensor.to), "moves by device name"),
        Replacement(
            torch.Tensor,
            "type",
            _tensor_type(torch.Tensor.type),
            "optimizer and clipping compare 'torch.cuda.FloatTensor'",
        ),
        Replacement(torch.nn.Module, "cuda", _same, "moves of whole modules"),
        Replacement(cuda, "current_device", lambda: _CPU, "handed on as the device of buffers"),
        Replacement(cuda, "set_device", _set_device, "there is one device"),
        Replacement(cuda, "synchronize", _synchronize, "timers and pipeline communication wait for the device"),
        Replacement(cuda, "current_stream", lambda *_: _STREAM, "gradient buckets wait for the current stream"),
        Replacement(cuda, "Stream", CpuStream, "communication stream of overlapped reductions"),
        Replacement(cuda, "stream", _stream_context, "entering that stream"),
        Replacement(cuda, "Event", CpuEvent, "ordering between streams"),
        Replacement(cuda, "get_rng_state", _get_rng_state, "random states per parallel group"),
        Replacement(cuda, "set_rng_state", _set_rng_state, "random states per parallel group"),
        Replacement(cuda, "manual_seed", _seed, "random states per parallel group"),
        Replacement(cuda, "default_generators", _DefaultGenerators((_GENERATOR,)), "states that graphs can exchange"),
        Replacement(cuda, "_lazy_call", lambda call, **_: call(), "deferred seeding would never run"),
        Replacement(cuda, "FloatTensor", torch.FloatTensor, "float types of the FP32 residual conversion"),
        Replacement(cuda, "HalfTensor", torch.HalfTensor, "float types of the FP32 residual conversion"),
        Replacement(cuda, "BFloat16Tensor", torch.BFloat16Tensor, "float types of the FP32 residual conversion"),
    )


def _core_replacements() -> tuple[Replacement, ...]:
    """Return the names inside megatron-core itself, imported only once torch's are in place."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers as core_layers
    from megatron.core.tensor_parallel import random as core_random
    from megatron.core.transformer.moe import token_dispatcher

    reason = "reads and writes the CUDA generator through torch._C"
    fused = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
    )
    apex = "takes the place of apex's module of that name: weight gradients go straight into the gradient buffer"
    return (
        Replacement(core_layers, "fused_weight_gradient_mlp_cuda", fused, apex),
        Replacement(core_layers, "_grad_accum_fusion_available", True, apex),
        Replacement(
            core_layers,
            "F",
            types.SimpleNamespace(embedding=embedding),
            "its only use; a gradient of all rows, most of them zero, would be cleared, added up and converted",
        ),
        Replacement(
            rope_utils,
            "_apply_rotary_pos_emb_bshd",
            _rotary_embedding(rope_utils._apply_rotary_pos_emb_bshd),
            "six passes over memory and as many temporaries; the kernel needs one",
        ),
        Replacement(
            token_dispatcher,
            "maybe_move_tensor_to_cpu",
            _on_host,
            "tensors on a CPU stay tensors, but gloo wants numbers",
        ),
        Replacement(clip_grads, "l2_norm_impl", _multi_tensor_l2_norm, "loses digits in large tensors; see long_sums"),
        Replacement(core_random, "_get_cuda_rng_state", _get_core_rng_state, reason),
        Replacement(core_random, "_set_cuda_rng_state", _set_core_rng_state, reason),
    )


_MISSING = object()
_installed: list[tuple[Any, str, Any]] = []


def is_installed() -> bool:
    """Return whether the backend is in place."""
    return bool(_installed)


def install() -> None:
    """Put the backend in place; a second call does nothing.

    Raises:
        ConfigError: Torch sees a GPU.
    """
    if _installed:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "the CPU backend of megatron-core was asked for on a machine where torch sees a GPU",
            hint="set runtime.device to 'auto', or hide the GPU with CUDA_VISIBLE_DEVICES=''",
        )
    settle_vector_functions()
    # `with torch.device(…)` keeps a set of the factories that it redirects, made when first asked for: with our
    # wrappers in it, transformers would build models half on the CPU and half on the meta device.
    torch.utils._device._device_constructors()
    for item in replacements():
        _replace(item)
    for item in _core_replacements():
        _replace(item)
    # megatron-core wraps a dozen element-wise functions in torch.compile: on a CPU that takes longer than it saves.
    core_import.call_uncompiled(True)


@contextlib.contextmanager
def installed_if_needed() -> Iterator[None]:
    """Have the backend in place for the duration of a with block, unless there is a GPU or it is in place already."""
    if torch.cuda.is_available() or _installed:
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


def _replace(item: Replacement) -> None:
    _installed.append((item.owner, item.name, item.owner.__dict__.get(item.name, _MISSING)))
    setattr(item.owner, item.name, item.value)


def uninstall() -> None:
    """Put every replaced name back."""
    if _installed:
        core_import.call_uncompiled(False)
    while _installed:
        owner, name, original = _installed.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
