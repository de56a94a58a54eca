"""Ranks that keep one mind."""

import torch
import torch.distributed as dist

from megatron_7b.errors import CollectiveError, ConfigError, DataFormatError
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
    heard = "CollectiveError: rank 1 failed in reading: broken on 1"
    assert run_ranks(3, _fail_together, [1]) == [(heard, 3), ("DataFormatError: broken on 1", 3), (heard, 3)]


def test_several_failures_keep_their_own_messages() -> None:
    outcomes = [outcome for outcome, _ in run_ranks(3, _fail_together, [0, 2])]
    assert outcomes[0] == "DataFormatError: broken on 0"
    assert outcomes[1] == "CollectiveError: rank 2 failed in reading: broken on 2"
    assert outcomes[2] == "DataFormatError: broken on 2"


def _fail_in_words(error: Exception) -> str:
    ranks = Ranks(torch.device("cpu"))
    try:
        with ranks.together("reading"):
            if ranks.rank == 1:
                raise error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_what_failed_is_said_whatever_it_was() -> None:
    """The rank that failed may be ended before it has shown its own message."""
    hinted = ConfigError("another run is writing here", hint="choose another --run-dir")
    heard, own = run_ranks(2, _fail_in_words, hinted)
    assert own == "ConfigError: another run is writing here\nhint: choose another --run-dir"
    assert heard == f"CollectiveError: rank 1 failed in reading: {own.removeprefix('ConfigError: ')}"
    heard, own = run_ranks(2, _fail_in_words, KeyError("loss"))
    assert (heard, own) == ("CollectiveError: rank 1 failed in reading: KeyError: 'loss'", "KeyError: 'loss'")


def _fail_alone() -> str:
    """Rank 0 leaves, and rank 1 fails in a block after whose end it would have told rank 0."""
    ranks = Ranks(torch.device("cpu"))
    if ranks.rank == 0:
        dist.destroy_process_group()
        return "left"
    try:
        with ranks.together("reading"):
            raise DataFormatError("broken on 1")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_lost_peer_does_not_hide_what_failed_here() -> None:
    assert run_ranks(2, _fail_alone) == ["left", "DataFormatError: broken on 1"]


def test_a_block_that_works_costs_nothing_but_the_word() -> None:
    assert run_ranks(2, _fail_together, []) == [("fine", 2)] * 2
