"""What one rank prepares and the others wait for."""

import time
from collections.abc import Callable

from megatron_7b.errors import MegatronError

_SECONDS_BETWEEN_LOOKS = 0.5


def waiting_for[T](prepare: Callable[[bool], T], is_preparing: bool, patience: float) -> T:
    """Return what `prepare(make)` returns, which raises a FileNotFoundError while something is not made yet.

    Args:
        prepare: Makes what is missing, or only finds it.
        is_preparing: Make it; otherwise wait until another process has.
        patience: How long [seconds].

    Raises:
        MegatronError: It did not appear in time.

    Collective: none; with several ranks all of them call it.
    """
    if is_preparing:
        return prepare(True)
    deadline = time.monotonic() + patience
    while True:
        try:
            return prepare(False)
        except FileNotFoundError as missing:
            if time.monotonic() > deadline:
                raise MegatronError(
                    f"{missing} did not appear within {patience:.0f} s, which the main rank makes",
                    hint="give all ranks one run folder on a file system that they share",
                ) from None
            time.sleep(_SECONDS_BETWEEN_LOOKS)
