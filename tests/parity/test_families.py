"""Families of transformers that need what the models of test_parity.py do not: on real processes, as families.py."""

import pytest

from tests import families
from tests.parity.families import MESH, FamilyCase, look


@pytest.mark.parametrize("name", ["llama4_text", "switch_transformers"])
def test_parity(run, name):
    (family,) = families.discovered([name])
    seen = look(family)
    assert seen.whole, seen
    result = run(FamilyCase(f"hf:{name}", MESH))
    assert result["ok"], result["message"]
