"""The size of a shard file is known before it is written."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.store.layout import ArraySpec
from vcache.store.shard_file import ShardFileWriter


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    by_frame=st.booleans(),
    dtype=st.sampled_from(("uint8", "int32", "float16", "float64")),
    rows_per_shard=st.integers(1, 9),
    written=st.sets(st.integers(0, 8)),
)
def test_the_size_of_a_shard_file_is_known_beforehand(
    shape: tuple[int, ...], by_frame: bool, dtype: str, rows_per_shard: int, written: set[int]
) -> None:
    chunk = (1, *shape[1:]) if by_frame and shape else shape
    spec = ArraySpec(name="x", dims=("a", "b", "c")[: len(shape)], shape=shape, chunk=chunk, dtype=dtype)
    rows = sorted(row for row in written if row < rows_per_shard)
    with TemporaryDirectory() as folder:
        (Path(folder) / "x").mkdir()
        file = ShardFileWriter(Path(folder), spec, 0, rows_per_shard)
        for row in rows:
            file.append(row, file.encode_row(np.ones(shape, dtype=dtype)))
        file.finish()
        file.sync()
        file.publish()
        assert file.path.stat().st_size == spec.shard_bytes(len(rows), rows_per_shard)
