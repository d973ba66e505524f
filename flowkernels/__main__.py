"""`python -m flowkernels` is the `flowkernels` command."""

import sys

from flowkernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
