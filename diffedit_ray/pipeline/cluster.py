"""Where the stages run: this machine or a cluster, on CPUs or GPUs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from diffedit_ray.errors import ModelError
from diffedit_ray.settings import JobSettings

IO_CPUS = 0.25
"""CPUs a fetch or store task asks Ray for; they mostly wait."""


def start_ray() -> None:
    """Join the cluster of the environment, or start Ray on this machine, quietly."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    # at their defaults both print of things no user of this package can act on
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        # fewer than two and the actor would leave no room for the tasks that feed it
        options.update(address="local", include_dashboard=False, num_cpus=max(2, os.cpu_count() or 2))
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place, which leaves without winding up


@dataclass(frozen=True)
class Replicas:
    """How many model replicas run, on what.

    Attributes:
        least, most: Actors in the pool.
        device: Where each holds its model.
        gpus, cpus: What each asks Ray for.
        threads: Torch threads of each; none is torch's own choice.
    """

    least: int
    most: int
    device: str
    gpus: float | None
    cpus: float
    threads: int | None


def replicas(job: JobSettings) -> Replicas:
    """One GPU an actor where the cluster has any, else CPU actors that share the cores out.

    Raises:
        ModelError: A GPU is asked for and this machine has none.
    """
    import ray

    have = ray.cluster_resources()
    gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 1.0)
    if (job.device == "auto" and gpus) or job.device.startswith("cuda"):
        if not gpus and not os.environ.get("RAY_ADDRESS"):  # a cluster may still get one, this machine will not
            raise ModelError(f"device {job.device!r} cannot be used: this machine has no GPU that Ray sees")
        most = max(job.max_actors or gpus, job.min_actors, 1)
        return Replicas(job.min_actors, most, "cuda" if job.device == "auto" else job.device, 1, 1.0, job.threads)
    most = max(job.max_actors or job.min_actors, job.min_actors)
    threads = job.threads or max(1, int(cpus) // most)
    # fetch and store need a CPU of their own, however many actors there are
    share = min(max(0.5, threads - 1), (cpus - 1) / most) if cpus > 1 else 0.5 / most
    share = int(share) if share >= 1 else round(share, 3)  # Ray takes no fractions above 1
    return Replicas(job.min_actors, most, job.device if job.device != "auto" else "cpu", None, share, threads)
