"""`megatron-7b compare`: two evaluations on tasks beside one another.

    megatron-7b compare before.json after.json --report compared.html

Both are what `megatron-7b evaluate --tasks … --output F.json` wrote. If both have their questions (`--log-samples`),
the models are compared question by question.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_7b.cli.tables import align
from megatron_7b.runtime.output_paths import check_file_to_write

SUMMARY = "compare two evaluations on tasks"


def main(argv: list[str]) -> int:
    """Run the command; returns 0.

    Raises:
        MegatronError: A file is missing or holds something else, or the two have no task in common.
    """
    flags = _parser().parse_args(argv)
    if flags.report is not None:
        check_file_to_write(flags.report, "--report")
    from megatron_7b.evaluation.report import compare_results, write_report
    from megatron_7b.evaluation.report.items import read_results

    first, second = read_results(flags.first), read_results(flags.second)
    compared = compare_results(first, second)
    if flags.report is not None:
        write_report(flags.report, second, other=first)
    if flags.json:
        print(json.dumps([asdict(one) for one in compared]))
        return 0
    rows = [["task", "measure", "first", "second", "difference", "95 % interval", "better", "worse", "p"]]
    for one in compared:
        values = [f"{one.first.value:.4f}", f"{one.second.value:.4f}", f"{one.second.value - one.first.value:+.4f}"]
        tested = [""] * 4
        if one.test is not None:
            low, high = one.test.interval
            tested = [
                f"{low:+.4f} to {high:+.4f}",
                str(one.test.better),
                str(one.test.worse),
                f"{one.test.p_value:.3g}",
            ]
        rows.append([one.first.task, one.first.title, *values, *tested])
    print("\n".join(align(rows, num_left=2)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-7b compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="JSON file of the first evaluation")
    parser.add_argument("second", type=Path, help="JSON file of the second")
    parser.add_argument("--report", type=Path, metavar="FILE", help="HTML page of the second beside the first")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser
