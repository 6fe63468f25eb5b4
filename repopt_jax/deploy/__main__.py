"""The command `repopt-deploy`, also python -m repopt_jax.deploy; see --help."""

import sys
from collections.abc import Sequence

from repopt_jax.extras import needs_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    with needs_extra("deploy", command="repopt-deploy"):
        from repopt_jax.deploy import command_line
    return command_line.main(argv)


if __name__ == "__main__":
    sys.exit(main())
