"""Which steps of a run are profiled: `10-12`, or a single one."""

import re

MAX_PROFILED_STEPS = 10
"""A step of a large model is 100,000 events, each some hundred bytes in memory and in the trace."""


def read_profile_steps(text: str) -> range:
    """Return the steps that `10-12` or `10` names.

    Raises:
        ValueError: It names none, or too many; the message says what was expected.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if match is None:
        raise ValueError("expected a step or a range of steps, such as 10 or 10-12")
    first, last = int(match[1]), int(match[2] or match[1])
    if first < 1:
        raise ValueError("the first step of a run is step 1")
    if last < first:
        raise ValueError(f"ends before it begins; did you mean {last}-{first}?")
    if last - first >= MAX_PROFILED_STEPS:
        raise ValueError(
            f"has {last - first + 1} steps, and a profile holds at most {MAX_PROFILED_STEPS} in memory; two or three "
            f"show where the time goes: {first}-{first + 2}"
        )
    return range(first, last + 1)
