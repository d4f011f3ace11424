"""Bytes on links, read from a compiled program; meshes of a family; what the loop costs."""

import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.sharding.mesh import MeshConfig
from experiments.benchmarks import loop, scaling
from experiments.benchmarks.scaling import (
    Config,
    collectives,
    mesh_of,
    sent_bytes,
    whole_bytes,
)

PROGRAM = """
  %a = f32[8,6]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %b = (f32[10]{0}, bf16[3,2]{1,0}) all-reduce(%q, %r), replica_groups=[4,2]<=[8], to_apply=%add
  %c = s32[] all-reduce(%s), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %d = f32[7]{0} collective-permute(%t), source_target_pairs={{0,1},{1,0}}
  %e = f32[2,3]{1,0} reduce-scatter(%u), replica_groups=[2,4]<=[8], dimensions={0}
  %f = f32[99]{0} fusion(%all-reduce.7), calls=%g
"""


def test_what_a_device_sends_in_a_ring():
    assert sent_bytes(collectives(PROGRAM)) == {
        "all-gather": 8 * 6 * 4 * 3 / 4,
        "all-reduce": 2 * (10 * 4 + 3 * 2 * 2) * 1 / 2 + 2 * 4 * 7 / 8,
        "collective-permute": 7 * 4,
        "reduce-scatter": 2 * 3 * 4 * 3,
        "all-to-all": 0,
    }


def test_the_arrays_of_collectives_count_whole():
    gathered, summed, moved = 8 * 6 * 4, 10 * 4 + 3 * 2 * 2 + 4, 7 * 4
    scattered = 2 * 3 * 4 * 4  # each of four devices keeps a quarter
    assert whole_bytes(collectives(PROGRAM)) == gathered + summed + moved + scattered


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", 2),
        ("[2,3]<=[3,2]T(1,0)", 3),
        ("{{0}}", 1),
    ],
)
def test_groups_of_devices_in_every_form(groups, size):
    line = (
        f"  %a = f32[5]{{0}} all-reduce(%q), channel_id=1, replica_groups={groups}, to_apply=%add"
    )
    assert sent_bytes(collectives(line))["all-reduce"] == pytest.approx(
        2 * 5 * 4 * (size - 1) / size
    )


def test_an_unknown_form_is_no_silent_zero():
    with pytest.raises(ValueError, match="not known"):
        list(collectives("  %a = f32[5]{0} all-reduce(%q), replica_groups=@all, to_apply=%add"))


def test_families_of_meshes():
    assert mesh_of("data", 8) == MeshConfig(8, 1, 1)
    assert mesh_of("fsdp", 8) == MeshConfig(1, 8, 1)
    assert mesh_of("tensor 2", 8) == MeshConfig(1, 4, 2)
    assert mesh_of("tensor 2", 1) is None
    with pytest.raises(UserError, match="must be data, fsdp or tensor N"):
        Config(families=("diagonal",))


@pytest.mark.slow
def test_work_of_a_device_stays_when_devices_and_rows_grow():
    config = Config(
        target="cpu_target",
        draft="cpu_draft",
        devices=(2, 8),
        families=("data", "fsdp"),
        input_length=16,
        target_length=8,
    )
    summary, records = scaling.measure(config, 0)
    assert [record["devices"] for record in records] == [2, 8, 2, 8]
    one, many = records[:2]
    assert many["rows"] == 4 * one["rows"]
    assert many["flops"] == pytest.approx(one["flops"], rel=0.1)
    assert many["collective_bytes"] == pytest.approx(one["collective_bytes"], rel=0.1)
    assert 0 < one["sent_bytes"] < many["sent_bytes"] < 2 * one["sent_bytes"]  # (n - 1) / n
    assert summary


def test_a_save_is_told_beyond_the_copy_that_it_needs():
    config = loop.Config(steps=11, save_every=5, repeats=3)
    assert config.saves == 2
    seconds = {
        "step": (1.0, 2.0, 1.0),
        "step_with_copies": (1.5, 2.5, 1.25),
        "loop": (1.25, 2.5, 1.0),
        "loop_with_saves": (2.0, 3.25, 2.0),
    }
    records = [
        {"way": way, "repeat": repeat, "seconds_per_step": times[repeat]}
        for repeat in range(3)
        for way, times in seconds.items()
    ]
    found = loop.summarize(config, records)
    assert [found[f"seconds_per_step_{way}"] for way in loop.WAYS] == [1.0, 1.5, 1.25, 2.0]
    assert [found[f"overhead_{way}"] for way in loop.WAYS[1:]] == [0.5, 0.25, 1.0]
    assert found["seconds_of_a_copy"] == 0.5 * 11 / 2
    assert found["seconds_of_a_save"] == 0.75 * 10 / 2
    assert found["seconds_of_a_save_beyond_its_copy"] == 0.75 * 10 / 2 - 0.5 * 11 / 2


@pytest.mark.slow
def test_the_loop_is_measured_in_all_its_ways(models, monkeypatch):
    copies = []
    monkeypatch.setattr(loop, "_copy", lambda state: copies.append(int(state.step)))
    config = loop.Config(
        target=str(models / "target"),
        draft=str(models / "draft"),
        batch_size=8,
        rollout_length=5,
        steps=5,
        save_every=2,
        repeats=1,
    )
    summary, records = loop.measure(config, 0)
    assert [record["way"] for record in records] == list(loop.WAYS)
    assert copies == [2, 4]  # where the loop saves, but for its save at the end
    assert all(summary[f"seconds_per_step_{way}"] > 0 for way in loop.WAYS)


def test_a_loop_without_saves_is_refused():
    with pytest.raises(UserError, match=r"loop\.save_every is 60, must be from 1 to below the 60"):
        loop.Config(save_every=60)
