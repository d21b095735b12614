"""Mesh descriptions: sizes of the axes, and one clear sentence for what is wrong."""

import pytest

from tedcompile.mesh import MeshShape, shape_of


@pytest.mark.parametrize(
    "given, want",
    [
        ("dp=1,ep=4,tp=2", MeshShape(1, 4, 2)),
        ("tp=2", MeshShape(tp=2)),
        (" ep=2 , dp=3 ", MeshShape(dp=3, ep=2)),
        ("", MeshShape()),
        ({"ep": 2, "tp": 4}, MeshShape(ep=2, tp=4)),
        (MeshShape(ep=2), MeshShape(ep=2)),
    ],
    ids=str,
)
def test_descriptions(given, want):
    assert shape_of(given) == want


def test_sizes():
    mesh = MeshShape(dp=2, ep=3, tp=4)
    assert (mesh.world, mesh["data"], mesh["ep"]) == (24, 6, 3)
    assert mesh.as_dict() == {"dp": 2, "ep": 3, "tp": 4}


@pytest.mark.parametrize(
    "text, message",
    [
        ("pp=2", "unknown mesh axis 'pp'"),
        ("tp", "mesh axis tp needs a size"),
        ("tp=0", "mesh axis tp needs a size of at least 1, got '0'"),
        ("tp=-1", "at least 1, got '-1'"),
        ("tp=two", "got 'two'"),
        ("tp=2,tp=2", "mesh axis tp is given twice"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=message):
        MeshShape.parse(text)


def test_wrong_type():
    with pytest.raises(TypeError, match="DeviceMesh .* got tuple"):
        shape_of((1, 2))
