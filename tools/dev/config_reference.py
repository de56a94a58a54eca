#!/usr/bin/env python3
"""Write docs/configuration.md: every option of a run, from the schema.

.venv/bin/python tools/dev/config_reference.py
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_7b.config.options import Option, leaf_options, sections
from megatron_7b.config.problems import shown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

_INTRODUCTION = """\
# Configuration

Every option of `megatron-7b pretrain`, written from the schema by `tools/dev/config_reference.py`. On the command line
an option is `--section.its-name VALUE`, in YAML a key of its section. `megatron-7b config list` shows the presets,
`megatron-7b config show PRESET` what one comes to, and [the user guide](user_guide.md#configuration) which value wins.
"""


def reference() -> str:
    """Return the page."""
    return "\n".join([_INTRODUCTION, *_tables()])


def _tables() -> Iterator[str]:
    for section, summary in sections().items():
        yield f"## {section}\n\n{summary}\n\n| option | values | default | |\n|---|---|---|---|"
        for option in leaf_options():
            if option.path.split(".")[0] == section:
                yield _row(option)
        yield ""


def _row(option: Option) -> str:
    default = shown(option.default)
    name = option.path.split(".", 1)[1]
    cells = (f"`{name}`", option.allowed, f"`{default}`" if default else "", option.doc)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
