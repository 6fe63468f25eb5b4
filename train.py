"""Train by the RepOptimizer method: python train.py --config=configs/digits.py --workdir=DIR.

Without arguments the whole method runs on scikit-learn's digits. `--help` lists the flags;
`--config.FIELD=VALUE` overrides a field of the configuration. The command `repopt-train`, which
comes with the package, does the same.
"""

from repopt_jax.training.command_line import main

if __name__ == "__main__":
    main()
