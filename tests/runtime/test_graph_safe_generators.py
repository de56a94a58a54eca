"""megatron-core's random states for CUDA graphs on the CPU backend: the same draws as with plain states."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import random as core_random
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, convert_cuda_rng_state, initialize_rng_tracker

from megatron_7b.config.schema import ParallelConfig
from megatron_7b.runtime.cpu import backend as cpu_backend
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, train


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with torch.random.fork_rng([]):
        cpu_backend.install()
        yield
        cpu_backend.uninstall()


def draw(count: int = 1) -> list[torch.Tensor]:
    return [torch.randn(5, device="cuda") for _ in range(count)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def expected(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator) for _ in range(count)]


def test_a_reference_follows_what_is_drawn() -> None:
    default = torch.cuda.default_generators[torch.cuda.current_device()]
    torch.cuda.manual_seed(1)
    state = default.graphsafe_get_state()
    copy = default.clone_state()
    draw(2)
    assert torch.equal(state.get_state(), torch.cuda.get_rng_state())
    assert not torch.equal(copy.get_state(), state.get_state())
    default.graphsafe_set_state(copy)
    assert equal(draw(2), expected(1, 2))
    assert torch.equal(copy.get_state(), state.get_state())
    copy.manual_seed(7)
    assert equal(draw(), expected(7, 1))
    default.graphsafe_set_state(state)
    assert equal(draw(), expected(1, 3)[2:])
    assert equal([torch.randn(5, generator=copy.clone_state())], expected(7, 2)[1:])


def test_a_plain_generator_is_advanced_too() -> None:
    default, plain = torch.cuda.default_generators[0], torch.Generator().manual_seed(3)
    before = default.graphsafe_get_state()
    default.graphsafe_set_state(plain)
    assert equal(draw(), expected(3, 1))
    default.graphsafe_set_state(before)
    assert equal([torch.randn(5, generator=plain)], expected(3, 2)[1:])


@pytest.mark.parametrize("graphable", [True, False])
def test_forks_draw_from_their_own_states(graphable: bool) -> None:
    """Also one within the other, and into the same again."""
    tracker = CudaRNGStatesTracker(use_cudagraphable_rng=graphable)
    torch.cuda.manual_seed(99)
    tracker.add("one", 11)
    tracker.add("two", 22)
    one, two = [], []
    with tracker.fork("one"):
        one += draw()
        with tracker.fork("two"):
            two += draw()
            with tracker.fork("one"):
                one += draw()
            two += draw()
        one += draw()
    with tracker.fork("two"):
        two += draw()
    assert equal(one, expected(11, 3))
    assert equal(two, expected(22, 3))
    assert equal(draw(2), expected(99, 2))


def test_states_make_the_round_trip() -> None:
    """Plain to graph-safe to plain, as checkpoints of megatron-core's own trainer do it."""
    torch.cuda.manual_seed(5)
    default = torch.cuda.get_rng_state()
    plain = CudaRNGStatesTracker()
    plain.add("state", 123)
    with plain.fork("state"):
        draw(2)
    safe = CudaRNGStatesTracker(use_cudagraphable_rng=True)
    safe.set_states({"state": convert_cuda_rng_state(plain.states_["state"], to_graphable=True).clone_state()})
    with safe.fork("state"):
        assert equal(draw(2), expected(123, 4)[2:])
    back = convert_cuda_rng_state(safe.states_["state"], to_graphable=False)
    assert isinstance(back, torch.Tensor)
    plain.set_states({"state": back})
    with plain.fork("state"):
        assert equal(draw(), expected(123, 5)[4:])
    assert torch.equal(torch.cuda.get_rng_state(), default)


def _train_with_dropout(graphable: bool) -> list[tuple[float, float]]:
    """Entry point of a rank."""
    initialize_rng_tracker(use_cudagraphable_rng=graphable, force_reset=True)
    assert core_random.get_cuda_rng_tracker().use_cudagraphable_rng is graphable
    return train(tiny_config(model={"hidden_dropout": 0.2, "attention_dropout": 0.1}, parallel=TP2), 3)


TP2 = {"tensor_model_parallel_size": 2, "recompute_granularity": "full"}


def test_a_run_with_dropout_is_the_same() -> None:
    assert run_ranks(2, _train_with_dropout, True) == run_ranks(2, _train_with_dropout, False)


def _states_across_forms(is_safe: bool) -> bool:
    """Entry point of a rank: whether a run with graphs continues the random numbers of one without, or the reverse."""
    from megatron_7b.checkpoint.sharding import random_state, restore_random_state
    from megatron_7b.parallel.groups import destroy_model_parallel, initialize_model_parallel

    initialize_rng_tracker(force_reset=True)
    initialize_model_parallel(ParallelConfig(), seed=3, graph_safe_random=is_safe)
    with core_random.get_cuda_rng_tracker().fork():
        draw(2)
    stored = [random_state(0, 1).data]
    with core_random.get_cuda_rng_tracker().fork():
        right = draw(3)
    destroy_model_parallel()
    assert all(isinstance(state, torch.Tensor) for state in stored[0]["tracker"].values())
    initialize_model_parallel(ParallelConfig(), seed=4, graph_safe_random=not is_safe)
    assert core_random.is_graph_safe_cuda_rng_tracker(core_random.get_cuda_rng_tracker()) is not is_safe
    restore_random_state(stored)
    with core_random.get_cuda_rng_tracker().fork():
        return equal(draw(3), right)


def test_checkpoints_are_the_same_with_and_without_graphs() -> None:
    assert run_ranks(1, _states_across_forms, True) == [True]
    assert run_ranks(1, _states_across_forms, False) == [True]


def _draws_as_if_nothing_was_between(is_safe: bool) -> bool:
    """Entry point of a rank."""
    from megatron_7b.parallel.groups import destroy_model_parallel, initialize_model_parallel
    from megatron_7b.training.task_evaluation import keeping_random_states

    found = []
    for has_more_between in (False, True):
        initialize_model_parallel(ParallelConfig(), seed=3, graph_safe_random=is_safe)
        tracker = core_random.get_cuda_rng_tracker()
        state = next(iter(tracker.get_states().values()))
        if has_more_between:
            with keeping_random_states(), tracker.fork():
                draw(4)
        assert not is_safe or next(iter(tracker.get_states().values())) is state
        with tracker.fork():
            found.append(draw(3))
        destroy_model_parallel()
    return equal(*found)


@pytest.mark.parametrize("is_safe", [False, True])
def test_what_keeps_random_states_keeps_those_of_graphs(is_safe: bool) -> None:
    assert run_ranks(1, _draws_as_if_nothing_was_between, is_safe) == [True]
