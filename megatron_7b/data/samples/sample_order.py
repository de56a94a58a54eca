"""What determines which sample of a run holds which tokens: a record that checkpoints keep, and resumed runs continue.

The order is a function of the sample number (`sampling`, `blend`). Continuing it is exact only as long as nothing that
it depends on has changed. A resumed run therefore compares the record of its checkpoint with its own settings:

- nothing has changed: the numbers continue. Where the corpora are, how samples are grouped into batches, what is masked
  and what is rearranged within documents do not matter here.
- the blend has changed (weights, limits, sets added, dropped or in another sequence): the new blend begins at the next
  sample, and each set continues after the last sample that was read from it. Nothing is read twice or skipped.
- samples are cut or shuffled otherwise (sequence length, seed, documents of the split, content of a corpus): the new
  samples overlap the old ones in no simple way, so some text would be read twice and some never. This is refused,
  unless `data.on_order_change` is `restart`: a new pass over all sets then begins, in an order of its own. With
  `trust`, a corpus at the same place with as many tokens is taken for the one that was read: it was repaired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from megatron_7b.data._index import CappedBlend
from megatron_7b.errors import ConfigError

WINDOWS = "windows"

type OnOrderChange = Literal["refuse", "trust", "restart"]


@dataclass(frozen=True, kw_only=True)
class SetOrder:
    """One set of a blend."""

    prefix: str
    """Where it is, as an absolute path; not part of what it is."""
    number: int
    """What its order is drawn from, besides the seed: its own for the whole run."""
    weight: int
    first_document: int
    end_document: int
    num_tokens: int
    """Of these documents."""
    content: str
    """`CorpusSpots.fingerprint`; empty if it was not taken; then the prefix takes its place."""
    max_samples: int | None
    """Samples of one pass after which it has run out; None: never."""
    consumed: int = 0
    """Samples of this pass that were read from it before the order began."""

    @property
    def remaining(self) -> int | None:
        """Samples that it can still give, from the beginning of the order."""
        return None if self.max_samples is None else max(0, self.max_samples - self.consumed)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two sets of which one continues the other."""
        return (self.content or self.prefix, self.first_document, self.end_document, self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The order of a run's training samples from `first_sample` on."""

    seq_length: int
    seed: int
    sets: tuple[SetOrder, ...]
    first_sample: int = 0
    """Global number at which this order began: 0, or where a resumed run brought another blend."""
    pass_begin: int = 0
    """Global number at which this pass over the data began: 0, or where a resumed run restarted it."""
    dropped: tuple[SetOrder, ...] = ()
    """Sets of this pass that are no longer read; they continue if they come back."""
    cut: str = ""
    """How samples are cut, in words; empty for windows of the token stream, each read once in an epoch."""

    @property
    def end(self) -> int | None:
        """Global number at which all sets have run out; None where one never does."""
        remaining = [one.remaining for one in self.sets]
        return None if None in remaining else self.first_sample + sum(count for count in remaining if count is not None)

    def blend(self) -> CappedBlend:
        """Return the schedule: its sample 0 is `first_sample`, and a set's sample 0 comes after its `consumed` ones."""
        return CappedBlend([one.weight for one in self.sets], [one.remaining for one in self.sets])

    def consumed_at(self, num_samples: int) -> list[int]:
        """Return how many samples of this pass each set has given once the run has consumed `num_samples`."""
        taken = self.blend().counts(num_samples - self.first_sample)
        return [one.consumed + int(count) for one, count in zip(self.sets, taken, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the inverse of `to_dict`.

        Raises:
            TypeError: There are other fields than those.
            KeyError: The sets are missing.
            ValueError: No run reads samples in this order.
        """
        sets = {name: tuple(SetOrder(**one) for one in values[name]) for name in ("sets", "dropped")}
        order = cls(**{**values, **sets})
        counts = [count for one in (*order.sets, *order.dropped) for count in (one.consumed, one.max_samples or 0)]
        if not order.sets or min(counts) < 0 or not 0 <= order.pass_begin <= order.first_sample:
            raise ValueError("it has no set, a negative number, or a pass that begins after its first sample")
        return order


@dataclass(frozen=True)
class Reached:
    """How far a run has come, as its checkpoint says."""

    consumed_samples: int
    order: SampleOrder | None
    """None where the checkpoint, of an earlier version, does not say."""
    differences: tuple[str, ...] = ()
    """Then: what is known to be different, in words; nothing else is taken to be."""


@dataclass(frozen=True)
class Continuation:
    """The order of a resumed run, and what a user should know about it."""

    order: SampleOrder
    notes: tuple[str, ...] = ()


def continue_order(reached: Reached, wanted: SampleOrder, on_change: OnOrderChange) -> Continuation:
    """Return the order of the samples that follow what a run has consumed, as the settings of this start want it.

    Args:
        reached: What was read so far.
        wanted: What a fresh run with these settings would read.
        on_change: `data.on_order_change`.

    Raises:
        ConfigError: Samples are cut or shuffled otherwise, and `on_change` does not allow it.
    """
    before, consumed_samples = reached.order, reached.consumed_samples
    if consumed_samples == 0:
        return Continuation(wanted)
    if before is not None and on_change == "trust":
        before = replace(before, sets=_without_contents(before.sets), dropped=_without_contents(before.dropped))
    partners, left = _match(before, wanted) if before is not None else ([], [])
    problems = _problems(before, wanted, partners, left) if before is not None else reached.differences
    if problems and on_change != "restart":
        raise ConfigError(
            "the samples of the resumed run would not continue those that were read:\n"
            + "\n".join(f"  {problem}" for problem in problems),
            hint="go back to the settings that the run had; or start a new run from the weights "
            "(--checkpoint.initialize-from); or let a new pass over all data begin, before this one is complete "
            "(--data.on-order-change restart); for a corpus that was only repaired: --data.on-order-change trust",
        )
    if problems:
        note = f"the data is read from its beginning, in a new order, from sample {consumed_samples:,} on, because "
        order = replace(wanted, first_sample=consumed_samples, pass_begin=consumed_samples)
        return Continuation(order, (note + "; ".join(problems),))
    if before is None:
        return Continuation(wanted)
    if _is_same_blend(before, wanted, partners):
        named = [
            replace(old, prefix=new.prefix, content=new.content)
            for old, new in zip(before.sets, wanted.sets, strict=True)
        ]
        return Continuation(replace(before, sets=tuple(named)))
    return _reblend(before, wanted, partners, consumed_samples)


def _without_contents(sets: Sequence[SetOrder]) -> tuple[SetOrder, ...]:
    return tuple(replace(one, content="") for one in sets)


def _match(before: SampleOrder, wanted: SampleOrder) -> tuple[list[SetOrder | None], list[SetOrder]]:
    """For each wanted set the recorded one that it continues, and the recorded ones that nothing continues."""
    left = [*before.sets, *before.dropped]
    partners: list[SetOrder | None] = []
    for new in wanted.sets:
        alike = [old for old in left if _is_same_set(old, new)]
        # The same corpus may be there several times, even under several names.
        alike.sort(key=lambda old, prefix=new.prefix: old.prefix != prefix)  # type: ignore[misc]
        partners.append(alike[0] if alike else None)
        if alike:
            left.remove(alike[0])
    return partners, left


def _is_same_set(old: SetOrder, new: SetOrder) -> bool:
    if old.content and new.content:
        return old.identity == new.identity
    return replace(old, content="").identity == replace(new, content="").identity


def _problems(
    before: SampleOrder, wanted: SampleOrder, partners: Sequence[SetOrder | None], left: Sequence[SetOrder]
) -> list[str]:
    """Return what makes it impossible to continue, in words."""
    problems = [
        f"{name} is {after}, the run had {was}"
        for name, was, after in (
            ("data.seq_length", before.seq_length, wanted.seq_length),
            ("training.seed", before.seed, wanted.seed),
            ("the kind of samples", before.cut or WINDOWS, wanted.cut or WINDOWS),
        )
        if was != after
    ]
    for new, partner in zip(wanted.sets, partners, strict=True):
        if partner is None:
            problems += [
                _difference(old, new)
                for old in left
                if old.prefix == new.prefix or (old.content and old.content == new.content)
            ][:1]
    return problems


def _difference(old: SetOrder, new: SetOrder) -> str:
    documents = (new.first_document, new.end_document) != (old.first_document, old.end_document)
    if documents and (old.content == new.content or not (old.content and new.content)):
        return (
            f"documents {new.first_document:,} to {new.end_document:,} of {new.prefix} are for training, the run had "
            f"{old.first_document:,} to {old.end_document:,} (data.split, data.valid"
            + (")" if old.content == new.content else ", or other documents in the corpus)")
        )
    return (
        f"{new.prefix} is not the corpus that was read: {new.num_tokens:,} tokens for training, the run had "
        f"{old.num_tokens:,}" + ("" if old.num_tokens != new.num_tokens else ", and their content differs")
    )


def _is_same_blend(before: SampleOrder, wanted: SampleOrder, partners: Sequence[SetOrder | None]) -> bool:
    if partners != list(before.sets):
        return False
    return all(
        (old.weight, old.max_samples) == (new.weight, new.max_samples)
        for old, new in zip(before.sets, wanted.sets, strict=True)
    )


def _reblend(
    before: SampleOrder, wanted: SampleOrder, partners: Sequence[SetOrder | None], consumed_samples: int
) -> Continuation:
    """Return the wanted blend from the next sample on; each set continues after the last one read from it."""
    ever_read = [
        replace(one, consumed=consumed)
        for one, consumed in zip(before.sets, before.consumed_at(consumed_samples), strict=True)
    ]
    positions = {one.number: one for one in (*ever_read, *before.dropped)}
    unused = max(positions) + 1
    sets, begun = [], []
    for new, partner in zip(wanted.sets, partners, strict=True):
        if partner is None:
            sets.append(replace(new, number=unused))
            begun.append(new.prefix)
            unused += 1
        else:
            sets.append(replace(new, number=partner.number, consumed=positions.pop(partner.number).consumed))
    ended = [one.prefix for one in before.sets if one.number in positions]
    note = f"the blend has changed: from sample {consumed_samples:,} on, each set continues where it was"
    note += f"; new: {', '.join(begun)}" if begun else ""
    note += f"; no longer read: {', '.join(ended)}" if ended else ""
    order = replace(
        wanted,
        sets=tuple(sets),
        first_sample=consumed_samples,
        pass_begin=before.pass_begin,
        dropped=tuple(positions.values()),
    )
    return Continuation(order, (note,))
