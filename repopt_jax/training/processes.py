"""Several processes, on one machine or many, that train one network together."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

# Each says how many processes its launcher has started: Slurm's srun, Open MPI's mpirun.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Each lists the hosts of a TPU slice, on GKE and where a user has said so.
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Holds the address of the first process of several slices.
TPU_SLICES = "MEGASCALE_COORDINATOR_ADDRESS"


def join_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Call `jax.distributed.initialize` if the arguments or the environment ask for it.

    Call it before anything else of jax. Without arguments, more than one task of Slurm's ``srun``
    or Open MPI's ``mpirun`` asks for it, and so does a TPU slice, whose hosts jax finds itself.

    Args:
      coordinator: ``HOST:PORT`` of the first process. None: as the launcher says.
      count: number of processes. None: as the launcher says.
      index: number of this process, from 0. None: as the launcher says.

    Raises:
      ValueError: if only some of the arguments are given, or `index` is not below `count`.

    >>> join_processes()  # alone here
    """
    # Its handler would swallow a SIGTERM that arrives before the loop has installed its own.
    jax.config.update("jax_enable_preemption_service", False)
    given = {"coordinator": coordinator, "count": count, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _launched_together():
            jax.distributed.initialize()
        return
    if missing:
        raise ValueError(
            f"coordinator, count and index must be given together, missing: {', '.join(missing)}"
        )
    if not 0 <= index < count:
        raise ValueError(f"index must be in 0..count-1 = {count - 1}, got {index}")
    # "deactivate": else under Slurm each process would take one device only.
    jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate")


def _launched_together() -> bool:
    found = os.environ
    if any(int(found.get(name, "1")) > 1 for name in COUNTS) or found.get(TPU_SLICES):
        return True
    for name in TPU_HOSTS:
        if name in found:
            return "," in found[name]
    # jax sets the first beside TPUs, the second elsewhere. Of a Cloud TPU VM's slice its metadata
    # server knows, and nothing in the environment tells.
    tpus = found.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in found
    return tpus and (found.get("JAX_PLATFORMS") or "tpu").startswith("tpu")


def agreed(values: Sequence[float]) -> list[float]:
    """The largest of every process's values, the same in all of them.

    Processes have to take the same steps and saves, though a signal may reach only one of them and
    no two clocks are equal. It waits for the device, so it belongs where metrics are read anyway.

    >>> agreed([0, 15])
    [0, 15]
    """
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.asarray(values, np.float32)).max(0).tolist()


def gathered(text: str) -> list[str]:
    """The texts of all processes, none of them empty; the same list in each process.

    >>> gathered("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def leave_the_others(exit_code: int):
    """End this process at once if there are others, for a reason that only this one may know.

    An ordinary end would wait for them, while they wait for this one in their next collective. This
    way jax's coordination service misses the process and ends the others.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(exit_code)


def wait_for_all(where: str):
    """Return once every process has reached `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
