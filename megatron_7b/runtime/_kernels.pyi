"""Addresses of dense arrays, sizes in elements; see csrc/include/megatron_7b/kernels.h."""

from collections.abc import Sequence

class FloatKernels:
    def __init__(self, instruction_set: str) -> None: ...
    def rms_norm(
        self, x: int, weight: int, y: int, inverse_rms: int, rows: int, width: int, epsilon: float, threads: int
    ) -> None: ...
    def rms_norm_backward(
        self,
        grad_y: int,
        x: int,
        weight: int,
        inverse_rms: int,
        grad_x: int,
        grad_weight: int,
        rows: int,
        width: int,
        threads: int,
    ) -> None: ...
    def swiglu(self, x: int, y: int, rows: int, width: int, threads: int) -> None: ...
    def swiglu_backward(self, grad_y: int, x: int, grad_x: int, rows: int, width: int, threads: int) -> None: ...
    def rotate(
        self,
        x: int,
        x_strides: Sequence[int],
        y: int,
        y_strides: Sequence[int],
        shape: Sequence[int],
        cosine: int,
        sine: int,
        turned: int,
        sign: float,
        threads: int,
    ) -> None: ...
    def softmax(
        self, x: int, factor: int, log_sum_exp: int, rows: int, width: int, num_true: int, threads: int
    ) -> None: ...
    def accumulate(self, x: int, total: int, count: int, threads: int) -> None: ...
    def product(
        self, x: int, weight: int, bias: int, y: int, rows: int, inputs: int, outputs: int, threads: int
    ) -> None: ...
    def decode_attention(
        self,
        inputs: Sequence[Sequence[int]],
        cache: Sequence[Sequence[int]],
        y: int,
        cosine: int,
        sine: int,
        positions: int,
        shape: Sequence[int],
        scale: float,
        threads: int,
    ) -> None: ...
    def attention(
        self,
        inputs: Sequence[Sequence[int]],
        y: int,
        log_sum: int,
        shape: Sequence[int],
        causal: bool,
        scale: float,
        threads: int,
    ) -> None: ...
    def attention_backward(
        self,
        inputs: Sequence[Sequence[int]],
        y: int,
        grad_y: Sequence[int],
        log_sum: int,
        gradients: Sequence[int],
        shape: Sequence[int],
        causal: bool,
        scale: float,
        threads: int,
    ) -> None: ...

class BFloat16Kernels(FloatKernels): ...

def instruction_sets() -> list[str]: ...
