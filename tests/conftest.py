"""What every test process starts with: one thread, no network, and hypothesis without a stopwatch."""

import os

# Before anything imports torch: ranks are processes, and threads of several test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whatever is not on the disk is not there: a test must never wait for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Figures are drawn without a screen, and their caches belong to no test.
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest

# Times vary with what else runs on the machine; the same examples each time, so that a failure can be repeated.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
