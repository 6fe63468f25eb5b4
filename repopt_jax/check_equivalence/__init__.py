"""Checks on this machine that GR trains what it claims: ``python -m repopt_jax.check_equivalence``.

Networks of branches with constant scales (CSLA) are trained with the plain optimizer, plain
networks with the RepOptimizer, from the same start on the same batches in float64. The table
shows how far the plain network's kernels are from the merged ones afterwards.
"""
