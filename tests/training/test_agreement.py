"""Ranks that keep one mind."""

import torch
import torch.distributed as dist

from megatron_7b.errors import CollectiveError, DataFormatError
from megatron_7b.training.agreement import Ranks
from tests.support.ranks import run_ranks


def _maxima() -> list[int]:
    ranks = Ranks(torch.device("cpu"))
    return ranks.maximum(ranks.rank, 10 - ranks.rank, 2**40 + ranks.rank)


def test_every_rank_gets_the_largest_of_each_value() -> None:
    assert run_ranks(3, _maxima) == [[2, 10, 2**40 + 2]] * 3


def _fail_together(failing: list[int]) -> tuple[str, int]:
    ranks = Ranks(torch.device("cpu"))
    try:
        with ranks.together("reading"):
            if ranks.rank in failing:
                raise DataFormatError(f"broken on {ranks.rank}")
    except (DataFormatError, CollectiveError) as error:
        outcome = f"{type(error).__name__}: {error}"
    else:
        outcome = "fine"
    # Whatever happened, all ranks are still in step with one another.
    total = torch.ones((), dtype=torch.int64)
    dist.all_reduce(total)
    return outcome, int(total)


def test_a_block_that_fails_somewhere_fails_everywhere() -> None:
    heard = "CollectiveError: rank 1 failed in reading; its own message says why"
    assert run_ranks(3, _fail_together, [1]) == [(heard, 3), ("DataFormatError: broken on 1", 3), (heard, 3)]


def test_several_failures_keep_their_own_messages() -> None:
    outcomes = [outcome for outcome, _ in run_ranks(3, _fail_together, [0, 2])]
    assert outcomes[0] == "DataFormatError: broken on 0"
    assert outcomes[1].startswith("CollectiveError: rank 2 failed")
    assert outcomes[2] == "DataFormatError: broken on 2"


def test_a_block_that_works_costs_nothing_but_the_word() -> None:
    assert run_ranks(2, _fail_together, []) == [("fine", 2)] * 2
