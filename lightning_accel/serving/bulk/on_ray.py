"""Compute parts on a Ray cluster, or on this machine's."""

from collections.abc import Sequence
from typing import Any

from lightning_accel.core.optional import require
from lightning_accel.engines.base import load_runner
from lightning_accel.errors import RunError
from lightning_accel.serving.bulk.worker import Job, Part, compute


class _Computes:
    """An actor with an engine; Ray Data starts another one where it dies, and gives it the parts that weren't computed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.runner = load_runner(job.bundle, job.engine, threads=job.threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        compute(self.runner, self.job, row["part"])
        return {"index": row["part"].index}


def run_on_ray(job: Job, missing: Sequence[Part], workers: int) -> None:
    """Compute parts with Ray Data. Bundle, data and the folder of results must be paths that every node has.

    Args:
        job: what each actor needs to know.
        missing: parts to compute.
        workers: actors.

    Raises:
        RunError: a part failed.
    """
    ray, data = (
        require("ray", "ray", "`predict_files(ray=True)`"),
        require("ray.data", "ray", "`predict_files(ray=True)`"),
    )
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    parts = data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
    try:
        done = parts.map(_Computes, fn_constructor_args=(job,), concurrency=workers, num_cpus=job.threads).take_all()
    except ray.exceptions.RayError as error:
        raise RunError(
            f"Ray must compute every part, but: {str(error).strip().splitlines()[-1]} The same call goes on."
        ) from error
    if len(done) != len(missing):
        raise RunError(f"Ray must compute {len(missing)} parts, but told of {len(done)}. The same call goes on.")
