"""Several processes, on one machine or many, that train one network together.

When one of them dies, the others would wait for it in their next collective: on CPU until the
connection breaks, which raises an error from deep inside, on GPUs until jax misses its heartbeat.
So every process but the first keeps a connection to the first. The system closes it when a process
ends, however that happens; one that ends in the ordinary way says so before. When the
first is gone, jax aborts the others at once: they hold the abort back until they have said why.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

# Each says how many processes its launcher has started: Slurm's srun, Open MPI's mpirun.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Each lists the hosts of a TPU slice, on GKE and where a user has said so.
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Says where the first process of several slices is.
TPU_SLICES = "MEGASCALE_COORDINATOR_ADDRESS"

_DONE, _LEAVING = b".", b"!"  # what a process says before it ends, by itself or for a reason
_GRACE = 5.0  # seconds for the others to find the same reason, and to say it
_lost = threading.Event()  # set when another process has ended without a farewell
_ending = threading.Lock()
_connections: list[socket.socket] = []
_log = logging.getLogger(__name__)


def join_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Call `jax.distributed.initialize` if the arguments or the environment ask for it.

    From then on, this process ends with a sentence soon after another one has died.

    To be called before anything else of jax. Without arguments, more than one task of Slurm's
    ``srun`` or Open MPI's ``mpirun`` asks for it; and TPUs do: jax finds out who shares them.

    Args:
      coordinator: ``HOST:PORT`` of the first process. None: as the launcher says.
      count: number of processes. None: as the launcher says.
      index: number of this process, from 0. None: as the launcher says.

    Raises:
      ValueError: if only some of the arguments are given, or `index` is not below `count`.

    >>> join_processes()  # alone here
    """
    # Its handler would swallow a SIGTERM that comes before the loop has installed its own.
    jax.config.update("jax_enable_preemption_service", False)
    given = {"coordinator": coordinator, "count": count, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _launched_together():
            jax.distributed.initialize()
            _watch_the_others(socket.gethostname())
        return
    if missing:
        raise ValueError(
            f"coordinator, count and index must be given together, missing: {', '.join(missing)}"
        )
    if not 0 <= index < count:
        raise ValueError(f"index must be in 0..count-1 = {count - 1}, got {index}")
    # "deactivate": else under Slurm each process would take one device only.
    jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate")
    _watch_the_others(coordinator.rpartition(":")[0].strip("[]"))


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
    halves = np.asarray(values, np.float64).view(np.uint32)  # jax would round a float64
    rows = np.ascontiguousarray(multihost_utils.process_allgather(halves))
    return rows.view(np.float64).max(0).tolist()


def gathered(text: str) -> list[str]:
    """Every process's text, which is not empty; the same list in all of them.

    >>> gathered("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def leave_the_others(exit_code: int) -> None:
    """End this process at once if there are others, for a reason that only this one may know.

    An ordinary end would wait for them, and they wait for this one in their next collective. They
    end a little later, by `join_processes`' watch.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _say(_LEAVING)
        os._exit(exit_code)


def wait_for_all(where: str) -> None:
    """Return once every process has come `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def end_if_another_is_lost() -> None:
    """End this process with a sentence if another one has died, which explains any error here."""
    if jax.process_count() > 1 and _lost.wait(2):
        _end()


def _watch_the_others(host: str) -> None:
    """Watch the other processes from now on; `host` is where the first one is."""
    connections = _connect(host)
    (failed,) = agreed([connections is None])
    if failed:  # jax's heartbeat remains, which ends this process after 100 s
        for connection in connections or ():
            connection.close()
        if jax.process_index() == 0:
            _log.warning("the processes cannot watch each other: no connection to %s", host)
        return
    _connections.extend(connections)
    atexit.register(_say, _DONE)
    _hold_aborts()
    for connection in connections:
        threading.Thread(target=_watch, args=(connection,), daemon=True).start()


def _hold_aborts() -> None:
    """Let an abort wait for a few seconds, so that `_watch` comes first where it has a reason.

    No Python code runs in a process that aborts by itself, and what runs must not wait for a lock.
    So the system's own ``sleep`` handles the signal: its number, 6, is the seconds.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)


def _connect(host: str) -> list[socket.socket] | None:
    """To the first process, or in it to all others; None where one of them fails."""
    connections = []
    with socket.create_server(("", 0)) as server:
        server.settimeout(20)
        token = secrets.token_hex(16)
        address, port, token = gathered(f"{host} {server.getsockname()[1]} {token}")[0].split()
        try:
            if jax.process_index() != 0:
                connections.append(socket.create_connection((address, int(port)), timeout=10))
                connections[0].sendall(token.encode())
            while jax.process_index() == 0 and len(connections) < jax.process_count() - 1:
                connection, _ = server.accept()
                connection.settimeout(10)
                if secrets.compare_digest(connection.recv(len(token)), token.encode()):
                    connections.append(connection)
        except OSError:
            return None
    for connection in connections:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a machine that is gone shows after a minute, not two hours
            for option, value in (("IDLE", 30), ("INTVL", 10), ("CNT", 3)):
                option = getattr(socket, f"TCP_KEEP{option}")
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connections


def _watch(connection: socket.socket) -> None:
    try:
        said = connection.recv(1)
    except OSError:
        said = b""
    if said == _DONE:
        return
    if said == _LEAVING:
        time.sleep(_GRACE)
    else:
        _lost.set()
    _end()


def _say(word: bytes) -> None:
    for connection in _connections:
        with contextlib.suppress(OSError):
            connection.sendall(word)


def _end() -> None:
    _ending.acquire()  # once: it is never released
    print(
        "another process of this run has ended; the same command, given to all of them, goes on "
        "from the last checkpoint\n",
        end="",  # one write, into which jax's own lines cannot break
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
