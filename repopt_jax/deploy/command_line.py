"""The command `repopt-deploy`; what it does is in `repopt_jax.deploy.commands`."""

from collections.abc import Sequence

from repopt_jax.extras import needs_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    with needs_extra("deploy", command="repopt-deploy"):
        from repopt_jax.deploy import commands
    return commands.main(argv)
