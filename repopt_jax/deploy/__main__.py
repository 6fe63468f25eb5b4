"""The command line: python -m repopt_jax.deploy export|quantize|eval|benchmark|report --help."""

import sys

from repopt_jax.deploy.command_line import main

if __name__ == "__main__":
    sys.exit(main())
