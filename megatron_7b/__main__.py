"""`python -m megatron_7b COMMAND …` is `megatron-7b COMMAND …`."""

import sys

from megatron_7b.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
