"""What a world's folder holds stays as it was: runs, results and tables of the docs stand on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megarlx.study.world.files import Sizes, write_world
from megarlx.study.world.settings import WorldSettings

SIZES = Sizes({"problems": 40, "facts": 30, "stories": 20, "behaviours": 20}, 5, 12, 8)
FOLDERS = {
    "default": (
        WorldSettings(seed=1),
        "43c266ef0ee124bc3ef83bfd4a417e026fb4c0380a23005a63ad59c138415e81",
    ),
    "one number, skewed": (
        WorldSettings(
            seed=7,
            quantities=1,
            answer="first_and_last",
            steps=(1.0, 1.0, 1.0, 1.0),
            demonstrations_per_question=4,
            fact_skew=1.5,
        ),
        "97fb9a906f1af91f854711e0df1547eb5317d3daf6f94e80cdf4a2f1cbbd1928",
    ),
    "digits, several": (
        WorldSettings(
            seed=3, digits=True, largest=999, start=(10, 300), several=(("1", 0.5), ("3", 0.5))
        ),
        "07d84c8e4e1722a7b99fba8be7310124cc78c428b9f89472e2c912770e5cc3b2",
    ),
}


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_world_without_tables_is_the_same_bytes_as_ever(name: str, tmp_path: Path) -> None:
    made, expected = FOLDERS[name]
    write_world(made, tmp_path, SIZES)
    found = hashlib.sha256()
    for path in sorted(tmp_path.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    assert found.hexdigest() == expected
