"""ExtractionSpec: everything that changes a feature's value, and nothing else."""

import json
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("float16", "bfloat16", "float32", "int8")
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ExtractionSpec:
    """What two stores must have in common for their features to be exchangeable; the store's key is a digest of it.

    Left out, because the value of a stored feature does not depend on it:

    - layers, Q/K, maps: which features are stored. Adding a layer must extend a store, not start another.
    - dataset, splits, labels: the same video gives the same features under any list.
    - paths, of videos and of weights: the weights' digest says what was loaded, so a moved file changes nothing.
    - channel statistics of int8: constants of each store, and what is read through them is the same feature to the
      error of int8.
    - batch size, decode threads, shard size: how fast, not what. A row agrees with itself in any batch to float32
      rounding (tested at 1e-6), far below a float16 step.
    - device: the arithmetic is of the same precision on every one of them, and equal to rounding.
    """

    model: str
    """Says what the weights do not, as heads and activation: open_clip's name, or a digest of a local configuration."""
    weights_sha256: str
    preprocessing: dict[str, Any]
    sampling: dict[str, Any]
    view: dict[str, Any]
    """Crop and flip."""
    decoder: dict[str, str]
    """Decoder and its libraries, with versions: two decoders may differ in the last bit of a pixel."""
    versions: dict[str, str]
    """Libraries that compute the rest."""
    dtype: str
    """Of the stored values, one of DTYPES. "int8" is of tokens, queries and keys; the rest is then float16."""
    precision: str = "float32"
    """Of the backbone's products and residual stream, one of PRECISIONS; see backbone.py."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype ({self.dtype!r}) must be one of {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision ({self.precision!r}) must be one of {', '.join(PRECISIONS)}")
        self.to_dict()  # what JSON cannot hold has no digest: say so here, not after an hour of extraction

    def to_dict(self) -> dict[str, Any]:
        """A deep copy of plain JSON values: tuples are lists, as they are when read back from a manifest.

        float32 is not told: stores of before there was another precision keep their key.
        """
        told = {name: value for name, value in asdict(self).items() if (name, value) != ("precision", "float32")}
        return json.loads(json.dumps(told, allow_nan=False))
