"""Machines: what collectives cost on their links, where groups lie, what files and names say."""

import re

import pytest

from tedcompile import machines
from tedcompile.machines import Link, Place, load, place
from tedcompile.mesh import MeshShape


def test_every_entry_loads_and_has_the_rates_that_training_needs():
    for name in machines.known():
        machine = load(name)
        assert machine.name == name and machine.rate(2) > 0 and machine.rate(4) > 0


@pytest.mark.parametrize(
    "axis, mesh, inside",
    [
        ("tp", MeshShape(2, 4, 2), 2),
        ("ep", MeshShape(2, 4, 2), 4),  # ep x tp is a node
        ("dp", MeshShape(2, 4, 2), 1),
        ("data", MeshShape(2, 4, 2), 4),
        ("ep", MeshShape(1, 8, 2), 4),  # half of the group in each of two nodes
        ("ept", MeshShape(1, 8, 2), 8),
        ("ep", MeshShape(1, 4, 8), 1),
        ("tp", MeshShape(1, 4, 3), 1),  # nodes of 8, groups of 3: ranks 6 and 7 are in one, 8 in the next
        ("tp", MeshShape(1, 2, 3), 3),  # all in one node
    ],
)
def test_members_of_a_group_in_one_node(axis, mesh, inside):
    assert place(axis, mesh, load("h200")).inside == inside


def test_collectives_by_hand():
    machine = load("h200", intra=Link(1e-6, 100e9), inter=Link(1e-5, 80e9))
    near, far, mixed = Place(4, 4, 8), Place(4, 1, 8), Place(4, 2, 8)
    assert machine.collective("all_reduce", 4e9, near) == pytest.approx((6e-6, 6e9 / 100e9))
    assert machine.collective("all_gather", 1e9, near) == pytest.approx((3e-6, 3e9 / 100e9))
    assert machine.collective("reduce_scatter", 4e9, near) == pytest.approx((3e-6, 3e9 / 100e9))
    # eight ranks share the node's 80 GB/s
    assert machine.collective("all_to_all", 4e9, far) == pytest.approx((3e-5, 3e9 / 10e9))
    # a third of the all-to-all stays in the node; a ring crosses the network once for two members
    assert machine.collective("all_to_all", 4e9, mixed) == pytest.approx((2.1e-5, 2e9 / 10e9))
    assert machine.collective("all_reduce", 4e9, mixed) == pytest.approx((4.2e-5, 6e9 / 20e9))
    assert machine.collective("all_to_all", 4e9, Place(1, 1, 8)) == (0, 0)


@pytest.mark.parametrize("rows, width, measured", [(2048, 768, 576), (512, 768, 466), (4096, 14336, 633)])
def test_grouped_products_as_measured_on_an_h200(rows, width, measured):
    assert 1e12 / load("h200").product(1e12, rows, width, 2) == pytest.approx(measured * 1e12, rel=0.01)


def test_few_rows_cost_the_reading_of_the_weights():
    machine = load("h200")
    assert machine.product(1e6, 1, 768, 2, weights=4.24e9) == pytest.approx(1e-3)


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "h200"\nranks_per_node = 4\ninter = { alpha = 1e-4, beta = 1e9 }')
    machine = load(str(path))
    assert (machine.name, machine.ranks_per_node, machine.inter.beta) == ("mine", 4, 1e9)
    assert machine.copy == load("h200").copy
    assert load(str(path), ranks_per_node=2).ranks_per_node == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("ranks_per_node = 4", "machine mine lacks 'copy'"),
        ('base = "h300"', "there is no machine 'h300' to start from"),
        ('base = "h200"\ncopy = -1', "copy must be a positive number, got -1"),
        ('base = "h200"\ncoppy = 1', "has an unknown key 'coppy'"),
        ('base = "h200"\nranks_per_node = 2.5', "must be a whole number"),
        ('base = "h200"\nintra = { alpha = 1 }', "intra must be { alpha = seconds, beta = bytes/s }"),
        ('base = "h200"\ngemm = { fp8 = 1 }', "gemm must be FLOP/s by dtype"),
        ("copy = ", "is not TOML"),
    ],
)
def test_bad_files(text, words, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(str(path))


def test_bad_names():
    with pytest.raises(ValueError, match="there is no machine 'h300': choose v100, a100"):
        load("h300")
    with pytest.raises(ValueError, match="cannot read nowhere.toml"):
        load("nowhere.toml")


def test_default_machine():
    names = [machines.default(*device).name for device in (("cpu",), ("cuda", "NVIDIA A100-SXM4-80GB"), ("cuda",))]
    assert names == ["cpu", "a100", "h200"]
