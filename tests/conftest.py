"""What every test process starts with: one thread, no network, and hypothesis without a stopwatch."""

import os

# Before anything imports torch: ranks are processes, and threads of several test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whatever is not on the disk is not there: a test must never wait for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Figures are drawn without a screen, and their caches belong to no test.
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
import subprocess
import sys

import hypothesis
import pytest

from tests.support.assets import FETCHER, assets_folder

# Under nohup it would be ignored here, and in every process that a test starts: none could test what it does.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Times vary with what else runs on the machine; the same examples each time, so that a failure can be repeated.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests have measured: whatever they recorded with `record_property("table: TITLE", row)`."""
    tables: dict[str, list[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, row in getattr(report, "user_properties", ()):
                if name.startswith("table: ") and report.when == "call":
                    tables.setdefault(name.removeprefix("table: "), []).append(str(row))
    for title, rows in sorted(tables.items()):
        terminalreporter.section(title)
        for row in sorted(rows):
            terminalreporter.line(row)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones, so that none is alone at the end; skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Fetch what is missing of the corpora and weights once, before several processes would each begin to.

    A failure is no error: the tests that need the asset try for themselves, and skip with the reason.
    """
    if FETCHER.is_file():
        subprocess.run([sys.executable, str(FETCHER), str(assets_folder())], stdout=subprocess.DEVNULL, check=False)
