"""The rule by which a run's failure is put down to one rank, on every order of events."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.errors import CheckpointError, CollectiveError, ConfigError
from megatron_7b.runtime.process.blame import End, Kind, Verdict, first_cause, judge
from megatron_7b.runtime.process.launched import Record, follows_from_a_lost_peer

times = st.floats(0.0, 100.0)


def verdicts(*ends: End, asked: tuple[signal.Signals, ...] = (), resumable: bool = True) -> list[Verdict]:
    judged = [judge(end, asked=asked, resumable=resumable) for end in ends]
    return [verdict for verdict in judged if verdict is not None]


def said(rank: int, kind: str, time: float, code: int | None = 1) -> End:
    return End(rank, code, time + 1.0, Record(kind, 1, f"of rank {rank}", time))  # type: ignore[arg-type]


# Whatever another rank may do after it has lost a peer, and when: an error of any kind, SIGABRT, an exit without a
# word, an end by the launcher's hand.
others = st.builds(
    lambda time, kind, code: End(0, code, time, Record(kind, 1, "x", time) if kind else None),
    times,
    st.sampled_from(["own", "followed", "stopped", None]),
    st.sampled_from([1, 2, 75, 0, None, -signal.SIGABRT]),
)


@given(others=st.lists(others, min_size=1, max_size=4), death=times, place=st.integers(0, 4))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, 40])
def test_a_killed_rank_is_to_blame_whatever_the_others_say_and_when(
    number: int, others: list[End], death: float, place: int
) -> None:
    ends = [End(rank + 1, other.code, other.seen, other.record) for rank, other in enumerate(others)]
    ends.insert(place, End(0, -number, death))
    cause = first_cause(verdicts(*ends))
    assert cause is not None
    assert (cause.end.rank, cause.exit_code, cause.kind) == (0, 128 + number, Kind.KILLED)


@given(own=times, followed=st.lists(times, min_size=1, max_size=4))
def test_an_error_of_its_own_comes_before_all_that_follows_from_it(own: float, followed: list[float]) -> None:
    ends = [said(rank, "followed", time) for rank, time in enumerate(followed)]
    cause = first_cause(verdicts(*ends, said(9, "own", own), End(8, -signal.SIGABRT, 0.0)))
    assert cause is not None
    assert cause.end.rank == 9


@given(times=st.lists(times, min_size=2, max_size=5, unique=True), kind=st.sampled_from(["own", "followed"]))
def test_among_errors_of_a_kind_the_earliest_counts(times: list[float], kind: str) -> None:
    cause = first_cause(verdicts(*(said(rank, kind, time) for rank, time in enumerate(times))))
    assert cause is not None
    assert cause.time == min(times)


def test_what_a_rank_recorded_before_the_launcher_ended_it_counts() -> None:
    cause = first_cause(verdicts(said(0, "followed", 1.0), said(1, "own", 5.0, code=None)))
    assert cause is not None
    assert cause.end.rank == 1
    assert first_cause(verdicts(End(0, None, 1.0))) is None


@pytest.mark.parametrize(
    ("end", "resumable", "expected"),
    [
        (End(0, 0, 1.0), True, None),
        (End(0, 75, 1.0), True, None),
        (End(0, None, 0.0), True, None),
        (End(0, 9, 1.0), True, (Kind.OWN, 9)),
        (End(0, -signal.SIGABRT, 1.0), True, (Kind.FOLLOWED, 134)),
        (End(0, -signal.SIGTERM, 1.0), True, (Kind.STOPPED, 75)),  # asked for, by whomever, before it listened
        (End(0, -signal.SIGUSR1, 1.0), True, (Kind.STOPPED, 75)),
        (End(0, -signal.SIGTERM, 1.0), False, (Kind.KILLED, 143)),  # nobody here has sent it
    ],
)
def test_single_ends(end: End, resumable: bool, expected: tuple[Kind, int] | None) -> None:
    verdict = judge(end, asked=(), resumable=resumable)
    assert (None if verdict is None else (verdict.kind, verdict.exit_code)) == expected


def test_a_second_interrupt_is_no_failure_of_a_rank() -> None:
    asked = (signal.SIGINT, signal.SIGINT)
    cause = first_cause(verdicts(said(0, "followed", 0.0), End(1, 130, 5.0), asked=asked))
    assert cause is not None
    assert (cause.kind, cause.exit_code) == (Kind.INTERRUPTED, 130)


def raised_from(reason: BaseException) -> CheckpointError:
    try:
        raise CheckpointError("checkpoint of step 8 could not be written") from reason
    except CheckpointError as error:
        return error


class DistNetworkError(RuntimeError):
    """Named as torch's."""


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:5093: Connection reset by peer"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CollectiveError("rank 1 failed in reading"), True),
        (RuntimeError(GLOO), True),
        (RuntimeError("[../unbound_buffer.cc:78] Timed out waiting 12000ms for recv operation to complete"), True),
        (RuntimeError("NCCL communicator was aborted on rank 3"), True),
        (DistNetworkError("The client socket has timed out after 60000ms"), True),
        (raised_from(RuntimeError(GLOO)), True),
        (raised_from(OSError(28, "No space left on device")), False),
        (ConfigError("model.vocab_size is too small"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection reset by peer"), False),
    ],
)
def test_errors_that_follow_from_a_lost_peer_are_told_from_others(error: BaseException, expected: bool) -> None:
    assert follows_from_a_lost_peer(error) is expected


def test_handling_a_lost_peer_does_not_make_another_error_of_it() -> None:
    """Only `raise … from` says that one error is the reason of the other."""
    error = ValueError("a mistake in the clean-up")
    error.__context__ = RuntimeError(GLOO)
    assert not follows_from_a_lost_peer(error)
