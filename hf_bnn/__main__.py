"""`python -m hf_bnn`: the same as the console script `hf-bnn`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
