"""`python -m flowkernels.bench` is `flowkernels bench`."""

import sys

from flowkernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
