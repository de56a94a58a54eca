"""`megatron-7b doctor`: what this machine can do, one line each, and the command that fixes what is missing."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from megatron_7b.cli.options import Parser, parse_arguments
from megatron_7b.runtime.machine.examination import Finding, examine_machine, is_ready

SUMMARY = "show what this machine can do, what is missing, and how to fix it"


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0, or 1 if something that training needs is broken.
    """
    parser = Parser("doctor", SUMMARY)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="limit for trying the imports")
    flags = parse_arguments(parser, argv).flags
    findings = examine_machine(flags.timeout)
    ready = is_ready(findings)
    if flags.json:
        print(json.dumps({"ok": ready, "checks": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    else:
        print(_report(findings))
        print("\nready to train" if ready else "\nnot ready: fix what is marked as broken")
    return 0 if ready else 1


def _report(findings: Sequence[Finding]) -> str:
    name_width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        detail = textwrap.shorten(" ".join(finding.detail.split()), 160, placeholder=" …")
        lines.append(f"{finding.status:<7} {finding.name:<{name_width}}  {detail}")
        if finding.remedy and finding.status != "ok":
            lines.append(f"{'':<7} {'':<{name_width}}  to fix: {finding.remedy}")
    return "\n".join(lines)
