"""lm-evaluation-harness's own command, with `--model megatron_7b` among its models.

python -m megatron_7b.evaluation.harness run --model megatron_7b --model_args checkpoint=runs/a --tasks my_task …
"""

import sys

from megatron_7b.errors import MegatronError
from megatron_7b.evaluation.harness.running import check_harness


def main() -> int:
    """Register the model, then run the harness."""
    try:
        check_harness()
        from lm_eval.__main__ import cli_evaluate

        import megatron_7b.evaluation.harness.registered  # noqa: F401

        cli_evaluate()
    except MegatronError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
