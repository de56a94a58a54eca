"""The fork server of the tests. Python has one per process, and what it has imported is settled when it starts."""

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOAD = "tests.support.preload"


def fork_server() -> ForkServerContext:
    """Return the context whose processes are forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context
