"""Which process of how many this one is, as a cluster tells it before `jax.distributed` starts.

`jax.distributed` finds its cluster by itself, but says nothing of it: whoever waits for the others
has to know how many there are to be. Asked in the order in which JAX looks: MPI and Slurm and GKE
say it in the environment, the metadata server of a Cloud TPU to its workers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping

from distillspec_jax.errors import UserError

MOST = 10**6  # hosts, or seconds to wait: more is a slip
_RANKS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_ATTRIBUTES = "computeMetadata/v1/instance/attributes"
_SECONDS = 5.0  # for one answer of the metadata server, which is on the same machine
_PAIR = re.compile(r"^\s*(\w+)\s*:\s*'?([^'\n]*?)'?\s*$", re.MULTILINE)


def detected(environment: Mapping[str, str] = os.environ) -> tuple[str, int | None]:
    """This process's number, and how many there are to be; a host's name and None if unknown."""
    for rank, count in _RANKS:
        if rank in environment and count in environment:
            ranks = number(environment, count, least=1)
            return str(number(environment, rank, least=0)), ranks
    told = dict(environment)
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not (workers and "TPU_WORKER_ID" in environment):
        told, workers = _of_metadata(environment)
    if not workers:
        return socket.gethostname(), None
    in_slice = len(workers.split(","))
    worker = number(told, "TPU_WORKER_ID", least=0)
    slice_index = number(told, "MEGASCALE_SLICE_ID", "0", least=0)
    slices = number(told, "MEGASCALE_NUM_SLICES", "1", least=1)
    return str(slice_index * in_slice + worker), slices * in_slice


def number(environment: Mapping[str, str], key: str, default: str = "", *, least: int) -> int:
    """The number that a variable holds; UserError if it is none from `least` to a million."""
    text = environment.get(key, default)
    if not (text.isdecimal() and len(text) < 8 and least <= int(text) <= MOST):
        raise UserError(f"{key} is {text[:40]!r}; give a number from {least} to {MOST:,}")
    return int(text)


def _of_metadata(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(Variables, workers of the slice) of a Cloud TPU's worker; no workers anywhere else."""
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return {}, ""
    ask = _asker(environment.get("GCE_METADATA_IP", "metadata.google.internal"))
    try:
        worker, workers = ask("agent-worker-number"), ask("worker-network-endpoints")
    except (OSError, ValueError):
        return {}, ""
    try:
        told = dict(_PAIR.findall(ask("tpu-env")))  # of several slices
    except (OSError, ValueError):
        told = {}
    return {**told, **environment, "TPU_WORKER_ID": worker.strip()}, workers


def _asker(host: str) -> Callable[[str], str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no way through a proxy

    def ask(attribute: str) -> str:
        place = f"http://{host}/{_ATTRIBUTES}/{attribute}"
        request = urllib.request.Request(place, headers={"Metadata-Flavor": "Google"})
        with opener.open(request, timeout=_SECONDS) as answer:
            return answer.read(2**20).decode()

    return ask
