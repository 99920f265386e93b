"""Decides whether each job on a Ray cluster gets a GPU."""

from typing import Any

from model_preparation.errors import SurgeryError


def gpus_per_job(ray: Any, device: str | None, cpus: int) -> int:
    """How many GPUs each job gets, 1 or 0. Also prints the device.

    Args:
        ray: the module `ray`, which has joined a cluster.
        device: "cuda" for a GPU, "cpu" for none; by default a GPU if the cluster has any.
        cpus: how many CPUs each job gets.

    Raises:
        SurgeryError: if `device` is "cuda" but the cluster has no GPU, or no machine is large enough for a job.
    """
    found = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not found:
        raise SurgeryError("--device cuda is given, but the Ray cluster has no GPU. Leave out --device.")
    gpus = 1 if found and device != "cpu" else 0
    note = "" if found else " (the Ray cluster has no GPU)"
    print(f"Device       {'a GPU from Ray' if gpus else 'the CPU'} for each job{note}", flush=True)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        sizes = ", ".join(
            f"{machine.get('CPU', 0):.0f} CPUs and {machine.get('GPU', 0):.0f} GPUs" for machine in machines
        )
        raise SurgeryError(
            f"A job needs {cpus} CPUs and {gpus} GPUs of one machine, but the cluster's machines have {sizes}. "
            "Give a smaller --cpus_per_job, or another cluster."
        )
    return gpus
