"""The command ``repopt-convert`` from a checkout; see `repopt_jax.convert`."""

import sys

from repopt_jax.convert import main

if __name__ == "__main__":
    sys.exit(main())
