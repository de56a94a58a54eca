"""The CPU kernels against torch's operators in FP64, for every instruction set that this processor has."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_7b.runtime import _kernels, weight_gradients
from megatron_7b.runtime.cpu import attention as cpu_attention
from megatron_7b.runtime.cpu import kernels as cpu_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with the kernels of one instruction set."""
    monkeypatch.setattr(_kernels, "instruction_sets", lambda: [request.param])
    cpu_kernels.bound_kernels.cache_clear()
    yield request.param
    cpu_kernels.bound_kernels.cache_clear()


def compare(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    rounded: int = 1,
) -> None:
    """Compare values and gradients with those of the reference in FP64, from the same inputs, `rounded` times."""
    mine = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in mine]
    y, right = ours(*mine), reference(*exact)
    assert y.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(right.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(y, mine, grad)
    expected = torch.autograd.grad(right, exact, grad.double())
    tolerance = rounded * (2e-6 if dtype == torch.float32 else 2**-8)
    for actual, wanted in zip((y, *gradients), (right, *expected), strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * scale)


def numbers(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 64, 515])
@pytest.mark.usefixtures("instruction_set")
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    compare(
        lambda x, w: cpu_kernels.rms_norm(x, w, 1e-5),
        lambda x, w: functional.rms_norm(x, (width,), w, 1e-5),
        [numbers(5, 13, width), numbers(width, seed=2)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 16, 43])
@pytest.mark.usefixtures("instruction_set")
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    compare(cpu_kernels.swiglu, reference, [numbers(3, 5, 2 * width, spread=4.0)], dtype)
    extreme = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(cpu_kernels.swiglu(extreme), torch.tensor([[0.0, 200.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("turned", [2, 24, 32])
@pytest.mark.usefixtures("instruction_set")
def test_rotary_embedding(turned: int, dtype: torch.dtype) -> None:
    """Of heads that are slices of something wider, as the queries and keys are; channels from `turned` on stay."""
    s, b, n, d = 9, 2, 3, 32
    half = numbers(s, 1, 1, turned // 2, seed=5, spread=3.0)
    angles = torch.cat((half, half), dim=-1)

    def reference(wide: Tensor) -> Tensor:
        x = wide[..., 8 : 8 + d]
        first, second = x[..., : turned // 2], x[..., turned // 2 : turned]
        c, sn = half.cos(), half.sin()
        return torch.cat((first * c - second * sn, second * c + first * sn, x[..., turned:]), dim=-1)

    compare(
        lambda wide: cpu_kernels.rotary_embedding(wide[..., 8 : 8 + d], angles.float()),
        reference,
        [numbers(s, b, n, 48)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("width", "num_true"), [(16, 16), (101, 97), (3000, 2048), (40, 1)])
@pytest.mark.usefixtures("instruction_set")
def test_softmax(width: int, num_true: int, dtype: torch.dtype) -> None:
    rows = 11
    x = numbers(rows, width, spread=5.0).to(dtype)
    factor = torch.linspace(0.0, 2.0, rows)
    true = x[:, :num_true].double()
    result = x.clone()
    normalizer = cpu_kernels.softmax_(result, factor, num_true)
    torch.testing.assert_close(normalizer.double(), torch.logsumexp(true, dim=1), rtol=1e-6, atol=1e-6)
    tolerance = 4e-6 if dtype == torch.float32 else 2**-8  # x less the largest is rounded: e^-45 has lost that much
    expected = true.softmax(dim=1) * factor.double().unsqueeze(1)
    torch.testing.assert_close(result[:, :num_true].double(), expected, rtol=tolerance, atol=1e-30)
    assert not result[:, num_true:].any()


@pytest.mark.usefixtures("instruction_set")
def test_softmax_of_logits_that_are_not_finite() -> None:
    """A diverged model must be seen in the loss."""
    ones = torch.ones(1)
    for bad in (math.nan, math.inf):
        assert cpu_kernels.softmax_(torch.tensor([[0.0, bad, 1.0]]), ones, 3).isfinite().item() is False
    assert cpu_kernels.softmax_(torch.full((1, 4), 3.0), ones, 0).item() == -math.inf


@pytest.mark.usefixtures("instruction_set")
def test_results_depend_on_neither_threads_nor_addresses() -> None:
    """Bit for bit: resumed runs lie elsewhere in memory."""
    rows, width = 700, 129
    source, weight, grad = numbers(rows, width).float(), numbers(width, seed=1).float(), numbers(rows, width, seed=2)

    def results(offset: int, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        room = torch.empty(source.numel() + offset)[offset:].view_as(source)
        x = room.copy_(source).requires_grad_()
        w = weight.clone().requires_grad_()
        y = cpu_kernels.rms_norm(x, w, 1e-6)
        logits = torch.empty(source.numel() + offset)[offset:].view_as(source).copy_(source)
        normalizer = cpu_kernels.softmax_(logits, torch.ones(rows), width)
        return [y, *torch.autograd.grad(y, (x, w), grad.float()), logits, normalizer]

    before = torch.get_num_threads()
    try:
        first = results(0, 1)
        for offset, threads in ((1, 1), (3, 2), (13, 3)):
            assert all(torch.equal(a, b) for a, b in zip(first, results(offset, threads), strict=True))
    finally:
        torch.set_num_threads(before)


def test_only_what_the_kernels_take_is_supported() -> None:
    a = torch.ones(2)
    assert cpu_kernels.is_supported(a, a)
    assert cpu_kernels.is_supported(a.bfloat16())
    assert not cpu_kernels.is_supported(a, a.bfloat16())
    assert not cpu_kernels.is_supported(a.double())
    assert not cpu_kernels.is_supported(torch.ones(2, device="meta"))


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="does not run"):
        _kernels.FloatKernels("vax")


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 3), (515, 67)])
@pytest.mark.usefixtures("instruction_set")
def test_weight_gradients_are_added(inputs: int, outputs: int) -> None:
    x, grad = numbers(6, inputs).float(), numbers(6, outputs, seed=1).float()
    buffer = numbers(outputs, inputs, seed=2).float()
    expected = buffer + grad.t() @ x
    rounded = buffer + (grad.bfloat16().t() @ x.bfloat16()).float()
    other = buffer.clone()
    weight_gradients.accumulate_weight_gradient(x, grad, buffer)
    torch.testing.assert_close(buffer, expected)
    weight_gradients.accumulate_weight_gradient(x.bfloat16(), grad.bfloat16(), other)
    assert torch.equal(other, rounded)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_of_an_embedding_is_summed_in_the_buffer(dtype: torch.dtype) -> None:
    """In FP32 over hundreds of tokens with the same id, in one order; autograd adds nothing to it, whatever it sums."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 7, (60, 41), generator=generator)
    grad = torch.randn(*ids.shape, 24, generator=generator).to(dtype)
    weight, results, before = torch.nn.Parameter(numbers(9, 24).to(dtype)), [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weight.main_grad, weight.grad = torch.ones(9, 24), None  # type: ignore[attr-defined]
        y = weight_gradients.embedding(ids, weight)
        assert torch.equal(y, functional.embedding(ids, weight))
        torch.autograd.backward((y, weight_gradients.embedding(ids[:0], weight)), (grad, grad[:0]))
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        results.append(weight.main_grad)  # type: ignore[attr-defined]
        assert not weight.grad.to_dense().any()  # type: ignore[attr-defined]
    torch.set_num_threads(before)
    exact = torch.ones(9, 24, dtype=torch.float64).index_add_(0, ids.flatten(), grad.flatten(0, 1).double())
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-6, atol=1e-4)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (75, 37), (3, 1)])
@pytest.mark.usefixtures("instruction_set")
def test_product_of_few_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Within rounding of the exact one; and a row is the same, bit for bit, whatever is beside it."""
    x, weight, bias = (
        numbers(*shape, seed=i).to(dtype) for i, shape in enumerate([(23, inputs), (outputs, inputs), (outputs,)])
    )
    y = cpu_kernels.product(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    tolerance = 3e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
    for rows in (1, 2, 3, 4, 7, 8, 15):
        assert torch.equal(cpu_kernels.product(x[-rows:], weight, bias), y[-rows:])
    assert torch.equal(cpu_kernels.product(x, weight), cpu_kernels.product(x, weight, torch.zeros_like(bias)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("queries", "width", "turned"), [(3, 64, 64), (1, 20, 8), (2, 16, 0)])
@pytest.mark.usefixtures("instruction_set")
def test_attention_of_one_token_per_row(queries: int, width: int, turned: int, dtype: torch.dtype) -> None:
    groups, positions = 2, torch.tensor([0, 5, 40])
    rows, capacity = len(positions), 48
    mixed = numbers(rows, groups, queries + 2, width).to(dtype)
    query, key, value = mixed[:, :, :queries], mixed[:, :, queries], mixed[:, :, queries + 1]
    keys, values = (numbers(rows + 1, groups, capacity, width, seed=seed).to(dtype) for seed in (1, 2))
    angles = numbers(rows, turned // 2, seed=3, spread=3.0).float()
    cosine, sine = angles.cos(), angles.sin()
    before = keys.clone()
    y = cpu_kernels.decode_attention(query, key, value, keys, values, cosine, sine, positions, 0.3)

    def turn(x: Tensor, row: int) -> Tensor:
        a, b, rest = x.double().split((turned // 2, turned // 2, width - turned), dim=-1)
        c, s = cosine[row].double(), sine[row].double()
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1).to(dtype)

    for row, position in enumerate(positions.tolist()):
        torch.testing.assert_close(keys[row, :, position], turn(key[row], row))
        assert torch.equal(values[row, :, position], value[row])
        keys[row, :, position] = before[row, :, position]
        for group in range(groups):
            known = torch.cat((before[row, group, :position], turn(key[row, group], row)[None])).double()
            weights = (turn(query[row, group], row).double() @ known.t() * 0.3).softmax(-1)
            expected = weights @ values[row, group, : position + 1].double()
            actual = y[row].view(groups, queries, width)[group].double()
            tolerance = 3e-6 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(keys, before)  # nothing else was touched


ATTENTIONS = {  # queries, keys, texts, heads, groups, width, causal, window
    "one block": (5, 5, 2, 3, 3, 8, True, None),
    "whole blocks, groups": (128, 128, 1, 4, 2, 64, True, None),
    "odd": (131, 131, 2, 2, 2, 33, True, None),
    "keys of a cache": (97, 201, 1, 4, 1, 80, True, None),
    "two queries": (2, 300, 1, 1, 1, 64, True, None),
    "encoder": (63, 66, 2, 3, 3, 16, False, None),
    "fewer keys": (70, 31, 1, 2, 2, 128, False, None),
    "a key before the own": (70, 70, 1, 2, 1, 8, True, 2),
    "window in a block": (200, 200, 2, 2, 1, 16, True, 3),
    "window of a block": (192, 192, 1, 2, 2, 16, True, 64),
    "odd window": (331, 331, 1, 4, 2, 24, True, 131),
    "window over a cache": (97, 400, 1, 4, 1, 33, True, 70),
    "window beyond the text": (100, 130, 1, 2, 2, 16, True, 1000),
    "all but the last": (90, 90, 1, 2, 2, 16, True, 89),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("s", "s_k", "b", "n", "g", "d", "causal", "window"), ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.usefixtures("instruction_set")
def test_attention(
    s: int, s_k: int, b: int, n: int, g: int, d: int, causal: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Of heads that are slices of something wider, as they come from the projection."""
    mask = torch.ones(s, s_k, dtype=torch.bool).tril(s_k - s) if causal else None
    if mask is not None and window is not None:
        mask = mask.triu(s_k - s - window + 1)

    def ours(query: Tensor, key_and_value: Tensor) -> Tensor:
        key, value = key_and_value.split(d, dim=-1)
        assert cpu_attention.is_supported(query, key, value, causal=causal, scale=0.2)
        return cpu_attention.attention(query, key, value, causal=causal, window=window, scale=0.2)

    def reference(query: Tensor, key_and_value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *key_and_value.split(d, dim=-1)))
        context = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=n != g)
        return context.permute(2, 0, 1, 3)

    # The weights of BF16 attention are rounded once more before the second product, and so are their gradients.
    compare(ours, reference, [numbers(s, b, n, d), numbers(s_k, b, g, 2 * d, seed=1)], dtype, rounded=2)


@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_attention_depends_on_neither_threads_nor_neighbours(dtype: torch.dtype, window: int | None) -> None:
    """Bit for bit, both ways, and with heads that share their keys."""
    s, b, d = 150, 3, 40
    query, grad = numbers(s, b, 4, d).to(dtype), numbers(s, b, 4, d, seed=3).to(dtype)
    key, value = (numbers(s, b, 2, d, seed=seed).to(dtype) for seed in (1, 2))

    def results(threads: int, rows: slice) -> list[Tensor]:
        torch.set_num_threads(threads)
        inputs = [x[:, rows].clone().requires_grad_() for x in (query, key, value)]
        y = cpu_attention.attention(*inputs, causal=True, window=window)
        return [y, *torch.autograd.grad(y, inputs, grad[:, rows])]

    before = torch.get_num_threads()
    try:
        first = results(1, slice(None))
        for threads, rows in ((2, slice(None)), (3, slice(None)), (2, slice(1, 2))):
            others = results(threads, rows)
            assert all(torch.equal(a[:, rows], b) for a, b in zip(first, others, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("instruction_set")
def test_attention_to_what_is_not_a_number_or_far_away() -> None:
    """A diverged model is seen, but not by the queries before; scores of thousands are no matter."""
    query, key, value = (numbers(70, 1, 1, 16, seed=seed).float() for seed in (0, 1, 2))
    key[60] = math.nan
    y = cpu_attention.attention(query, key, value, causal=True)
    assert y[:60].isfinite().all()
    assert y[60:].isnan().all()
    value[50] = math.inf
    assert not cpu_attention.attention(query, key, value, causal=True)[50:].isfinite().any()
    far = cpu_attention.attention(query * 1e4, key[:50], value[:50], causal=False)
    nearest = (query[:, 0, 0] @ key[:50, 0, 0].t()).argmax(dim=1)
    torch.testing.assert_close(far[:, 0, 0], value[nearest, 0, 0])


@pytest.mark.usefixtures("instruction_set")
def test_what_a_window_hides_does_not_count() -> None:
    """However large its scores are, both ways; what is not a number there is not looked at."""
    query, key, value = (numbers(300, 1, 1, 16, seed=seed).float() for seed in (0, 1, 2))
    loud = key.clone()
    loud[:40] = 1e4 * query[200]
    results = []
    for keys in (key, loud):
        inputs = [x.clone().requires_grad_() for x in (query, keys, value)]
        y = cpu_attention.attention(*inputs, causal=True, window=50)
        results.append([y[89:], *(x[89:] for x in torch.autograd.grad(y[89:].sum(), inputs))])
        assert all(x.isfinite().all() for x in results[-1])
    for quiet, shouted in zip(*results, strict=True):
        assert torch.equal(quiet, shouted)
    key[:60] = math.nan
    assert cpu_attention.attention(query, key, value, causal=True, window=50)[109:].isfinite().all()


def test_attention_takes_only_what_it_can() -> None:
    q = torch.ones(4, 1, 2, 8)
    assert cpu_attention.is_supported(q, q, q, causal=True)
    assert not cpu_attention.is_supported(q[:1], q, q, causal=True)
    assert not cpu_attention.is_supported(q, q[:3], q[:3], causal=True)
    assert not cpu_attention.is_supported(q, q, q[..., :4], causal=True)
    assert not cpu_attention.is_supported(q, q, q, causal=True, scale=-1.0)
