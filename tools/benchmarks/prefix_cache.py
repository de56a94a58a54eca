"""What keeping the beginnings of texts saves, and whether texts stay the same.

    python tools/benchmarks/prefix_cache.py CHECKPOINT --text F.jsonl [--dtypes fp32 bf16]

Prints for each dtype: greedy texts that differ (each alone with everything read, against most of its prompt kept, and
against eight at once), the time to the first token of a conversation's turns, and of prompts that share examples.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_7b.generation import GenerationOptions, Session, open_session
from megatron_7b.generation.prompts import Prompt

CACHE_BYTES = 2 * 2**30


def texts(session: Session, prompts: Sequence[Prompt], num_new: int, at_once: int) -> list[tuple[int, ...]]:
    """Return greedy tokens of each prompt."""
    options = GenerationOptions(temperature=0.0, max_new_tokens=num_new, num_beams=1, ignore_eod=True)
    found = []
    for begin in range(0, len(prompts), at_once):
        found += [tuple(one.token_ids) for one in session.generate(prompts[begin : begin + at_once], options)]
    return found


def first_token(session: Session, ids: Sequence[int], num_new: int, num_texts: int = 1) -> tuple[float, list[int]]:
    """Return the seconds until the first token of all texts of a prompt has come, and the tokens of the first text."""
    options = GenerationOptions(
        temperature=0.0, max_new_tokens=num_new, num_beams=1, ignore_eod=True, num_return_sequences=num_texts
    )
    begun = time.perf_counter()
    samples = session.submit(Prompt("", tuple(ids)), options)
    session.step()
    seconds = time.perf_counter() - begun
    for _ in session.run():
        pass
    return seconds, samples[0].token_ids


def turns(session: Session, ids: Sequence[int], num_turns: int, length: int, num_new: int) -> list[float]:
    """Return the time to the first token of each turn of a conversation."""
    found, context = [], list(ids[: 3 * length])
    for turn in range(num_turns):
        context += ids[(turn + 3) * length : (turn + 4) * length]
        seconds, reply = first_token(session, context, num_new)
        found.append(seconds)
        context += reply
    return found


def examples(session: Session, ids: Sequence[int], shared: int, own: int, count: int) -> list[float]:
    """Return the time to the first token of prompts that share their first tokens."""
    ends = [ids[shared + number * own : shared + (number + 1) * own] for number in range(count)]
    return [first_token(session, [*ids[:shared], *end], 1)[0] for end in ends]


def measure(checkpoint: Path, dtype: str, documents: Sequence[str], flags: argparse.Namespace) -> None:
    """Print the figures of one dtype."""
    overrides = {"precision.params_dtype": dtype, "runtime.num_threads": flags.threads}
    common = {"overrides": overrides, "max_cache_bytes": CACHE_BYTES}
    with open_session(checkpoint, **common) as session:  # type: ignore[arg-type]
        ids = [session.encode(document).ids for document in documents]
        cuts = [100 + 17 * number for number in range(flags.texts)]
        prompts = [Prompt("", one[:cut]) for one, cut in zip(ids, cuts, strict=False)]
        alone = texts(session, prompts, flags.tokens, 1)
        beside = texts(session, prompts, flags.tokens, 8)
        plain_turns = turns(session, ids[0][200:], 6, 40, 48)
        plain_examples = examples(session, ids[1][50:], 400, 30, 8)
    with open_session(checkpoint, prefix_cache=True, **common) as session:  # type: ignore[arg-type]
        texts(session, prompts, 1, 1)
        kept = texts(session, prompts, flags.tokens, 1)
        kept_turns = turns(session, ids[0][200:], 6, 40, 48)
        kept_examples = examples(session, ids[1][50:], 400, 30, 8)
    differ = [sum(one != other for one, other in zip(alone, others, strict=True)) for others in (kept, beside)]
    lengths = f"{len(prompts)} prompts of {min(cuts)} to {max(cuts)} tokens, {flags.tokens} new ones"
    print(f"{dtype}: {lengths}: {differ[0]} texts differ with kept beginnings, {differ[1]} eight at once")
    for name, plain, known in (("turns", plain_turns, kept_turns), ("examples", plain_examples, kept_examples)):
        shown = [" ".join(f"{seconds:.3f}" for seconds in values) for values in (plain, known)]
        ratio = statistics.median(plain[1:]) / statistics.median(known[1:])
        print(
            f"{dtype}: {name}, first token after [s]: read {shown[0]}; kept {shown[1]}; later ones {ratio:.1f} x faster"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="documents, a JSON object with `text` per line")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args(argv)
    with flags.text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"][:8000] for line, _ in zip(lines, range(flags.texts), strict=False)]
    for dtype in flags.dtypes:
        measure(flags.checkpoint, dtype, documents, flags)


if __name__ == "__main__":
    main()
