"""The default configuration: the whole method on scikit-learn's digits.

Command: python train.py --config=configs/digits.py --workdir=runs/digits
"""

from repopt_jax.training.digits import get_config as get_config
