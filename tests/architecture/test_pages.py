"""Pages that are written from the code are those of this code."""

import runpy

from tests.architecture.imports import REPOSITORY


def test_the_page_of_options_is_current() -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "dev" / "config_reference.py"))
    assert tool["PAGE"].read_text(encoding="utf-8") == tool["reference"](), "run tools/dev/config_reference.py"
