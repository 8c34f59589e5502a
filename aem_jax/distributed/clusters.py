"""The number of processes that SLURM, MPI, a TPU pod or Kubernetes started."""

import os

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError


def detected_count() -> int:
    """The number of processes that the environment announces: SLURM, Open MPI, a TPU pod, or a Kubernetes job.

    JAX detects clusters but has no public function for it. Where its private one has changed, only the variables of
    SLURM and Open MPI are read; for other clusters there is `--runtime.distributed on`.

    Raises:
        ConfigError: in a pod of an indexed Kubernetes job whose size cannot be found out. One process alone would
            train a run of its own in each pod.
    """
    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    try:
        from jax._src.clusters import ClusterEnv

        known = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        if not indexed:  # JAX would call the API of the cluster in any pod
            known = [kind for kind in known if kind.__name__ != "K8sCluster"]
        cluster = next((kind for kind in known if kind.is_env_present()), None)
        if cluster is None and indexed:
            raise RuntimeError("JAX detects no cluster here; in a job of GPUs it needs pip install 'jax[k8s]'")
        return 1 if cluster is None else cluster.get_process_count()
    except Exception as error:  # JAX may change this private class, and the API of a cluster may not answer
        if indexed:
            raise ConfigError(
                f"--runtime.distributed: the number of pods of this job (JOB_COMPLETION_INDEX is set) cannot be found "
                f"out: {error}; the pod's service account must be able to get and list pods and to get jobs "
                "(deploy/gke_gpu_jobset.yaml). With off, this pod is a run of its own"
            ) from error
        in_step = "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ
        return int(os.environ.get("SLURM_NTASKS" if in_step else "OMPI_COMM_WORLD_SIZE", "1"))


def expected_count(config: RuntimeConfig) -> int | None:
    """The number of processes that the run will have; None where only JAX can tell."""
    if config.distributed == "off":
        return 1
    if config.coordinator:
        return config.num_processes
    return detected_count() if config.distributed == "auto" else None
