"""Weak scaling by the compiler: what a device computes and sends when devices and rows grow.

No clock: the on-policy step is compiled for meshes of 1 to 64 virtual CPU devices, with a fixed
number of rows for each device of the row axes; the compiler counts the operations of one device,
and the sizes of all collectives are read from its program. The body of a loop (a token of a
rollout) is counted once, for every mesh alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.errors import UserError
from distillspec_jax.sharding.mesh import AXES, MeshConfig
from experiments import distill, parts, planning
from experiments.models import outline

# bytes of a buffer -> bytes that a device sends in a ring of n, over its links
_SENT = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
_COLLECTIVE = re.compile(
    r"= (?P<shape>\S+(?: \S+)*?) (?P<kind>" + "|".join(_SENT) + r")(?:-start)?\((?P<rest>[^\n]*)"
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
# peak operations a second in bfloat16, and bytes a second that a device sends, one way: the ICI of
# a TPU v5e (4 links of 50 GB/s), NVLink of an H100 (18 links of 25 GB/s)
CHIPS = {"v5e": (197e12, 200e9), "h100": (989e12, 450e9)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compiled, and for which meshes."""

    target: str = "cpu_t5_target"
    draft: str = "cpu_t5_draft"
    draft_layout: str = "replicated"
    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    families: tuple[str, ...] = ("data", "fsdp", "tensor 2")  # see mesh_of
    rows: int = 4  # for each device of the row axes
    input_length: int = 64
    target_length: int = 32
    loss_chunk: int = 16

    def __post_init__(self) -> None:
        for family in self.families:
            mesh_of(family, 8)


def mesh_of(family: str, devices: int) -> MeshConfig | None:
    """The mesh of a family with so many devices; None if it has none of that size.

    'data' and 'fsdp' grow along that axis; 'tensor N' has N devices on the tensor axis and the
    others on fsdp.
    """
    if family in ("data", "fsdp"):
        return MeshConfig(**dict.fromkeys(AXES, 1) | {family: devices})
    match = re.fullmatch(r"tensor (\d+)", family)
    if not match:
        raise UserError(f"family '{family}' of scaling must be data, fsdp or tensor N")
    tensor = int(match[1])
    return None if devices % tensor else MeshConfig(1, devices // tensor, tensor)


def measure(config: Config, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table, in a process of its own that has as many virtual devices as the largest mesh."""
    del seed
    flags = f"--xla_force_host_platform_device_count={max(config.devices)}"
    found = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.scaling"],
        input=json.dumps(dataclasses.asdict(config)),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    records = json.loads(found.stdout.splitlines()[-1])
    summary: dict[str, Any] = {}
    for family in config.families:
        name = family.replace(" ", "_")
        rows = [r for r in records if r["family"] == family and r["devices"] > r["smallest"]]
        for key in ("flops", "collective_bytes", "sent_bytes"):
            values = [row[key] for row in rows]
            if values and min(values) > 0:
                summary[f"{name}_{key}_largest_over_smallest"] = max(values) / min(values)
    return summary, records


def table(config: Config) -> list[dict[str, Any]]:
    """One record per family and number of devices; needs the devices."""
    records = []
    for family in config.families:
        meshes = [(n, mesh_of(family, n)) for n in config.devices]
        known = [(n, mesh) for n, mesh in meshes if mesh is not None]
        for devices, mesh in known:
            record = {"family": family, "devices": devices, "smallest": known[0][0]}
            records.append(record | _compiled(config, mesh))
            print(f"{family}: {devices} devices", file=sys.stderr, flush=True)
    return records


def _compiled(config: Config, mesh: MeshConfig) -> dict[str, Any]:
    """Operations and bytes of one device in one step, and what they mean on real chips."""
    data = TaskConfig(input_length=config.input_length, target_length=config.target_length)
    run = distill.DistillConfig(
        task=data,
        steps=1,
        batch_size=config.rows * mesh.data * mesh.fsdp,
        target=config.target,
        draft=config.draft,
        draft_layout=config.draft_layout,
        loss_chunk=config.loss_chunk,
        mesh=mesh,
    )
    layout, task = parts.open_layout(run), load_task(data)
    with jax.set_mesh(layout.mesh):
        prepared = distill.prepare(run, task, layout, outline)
        compiled = planning.compile_step(prepared, run, task, layout)
    program: Any = compiled
    found = list(collectives(program.as_text()))
    sent = sent_bytes(found)
    flops, total = program.cost_analysis()["flops"], sum(sent.values())
    times = {
        f"{chip}_{kind}_seconds": value
        for chip, (speed, link) in CHIPS.items()
        for kind, value in (("compute", flops / speed), ("links", total / link))
    }
    return {
        "rows": run.batch_size,
        "flops": flops,
        "collective_bytes": whole_bytes(found),
        "sent_bytes": total,
        **sent,
        **times,
    }


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: its kind, the bytes of its result, the devices of a group."""

    kind: str
    size: int
    devices: int


def collectives(program: str) -> Iterator[Collective]:
    """All collectives in the text of a compiled program."""
    for match in _COLLECTIVE.finditer(program):
        size = sum(
            _BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match["shape"])
        )
        yield Collective(match["kind"], size, _group_size(match["rest"]))


def whole_bytes(found: Iterable[Collective]) -> int:
    """Bytes of the arrays that are summed, gathered or moved, each counted whole."""
    return sum(c.size * (c.devices if c.kind == "reduce-scatter" else 1) for c in found)


def sent_bytes(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective, on rings."""
    sent = dict.fromkeys(_SENT, 0.0)
    for c in found:
        sent[c.kind] += _SENT[c.kind](c.size, c.devices)
    return sent


def _group_size(rest: str) -> int:
    """How many devices take part.

    Written as replica_groups={{0,1},{2,3}}, =[groups,size]<=..., or =mesh['a'=4,'b'=2] {'a'}, where
    'a':(2)2 is a part of an axis.
    """
    found = re.search(
        r"replica_groups=(\{\{[\d,]*\}|\[\d+,\d+\]|mesh\[[^]]*\](?:, device_ids=\S+)? \{[^}]*\})",
        rest,
    )
    if not found:
        if "replica_groups" in rest:
            raise ValueError(f"groups of devices in a form that is not known: {rest[:200]}")
        return 1
    groups = found[1]
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        taken = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups.rpartition("{")[2])
        return math.prod(int(part or sizes[axis]) for axis, part in taken)
    if groups.startswith("["):
        return int(groups.strip("[]").split(",")[1])
    return groups.count(",") + 1


def _from_json(values: Mapping[str, Any]) -> Config:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Config(**fields)


if __name__ == "__main__":
    print(json.dumps(table(_from_json(json.load(sys.stdin)))))
