# SPDX-License-Identifier: Apache-2.0
"""Sources that are no tokens but vectors: frames of speech, or what another model made of text.

A pair then names its array: the source of a line is a key of a file of arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import numpy_reason
from ..errors import DataError, require
from ..types import kind


class Features(Mapping[str, Tensor]):
    """Arrays (S, D) by name, as float32 tensors; S may differ, D may not.

    Args:
        arrays: by name, arrays or tensors of floating-point numbers.
        name: what messages call them.

    Attributes:
        size: D.

    Raises:
        DataError: there are none, or one has another shape, no step, or a number that is not
            finite.
        TypeError: it is no mapping.
    """

    def __init__(self, arrays: Mapping[str, Any], *, name: str = "features") -> None:
        if not isinstance(arrays, Mapping):
            raise TypeError(f"{name} must be arrays by name, got {kind(arrays)}")
        self.name = name
        self._tensors = {key: self._tensor(key, value) for key, value in arrays.items()}
        sizes = {tensor.shape[1] for tensor in self._tensors.values()}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "no arrays"
            raise DataError(f"{name}: expected arrays with one number of columns, got {found}")
        (self.size,) = sizes

    def _tensor(self, key: str, value: Any) -> Tensor:
        given = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        tensor = given
        if not isinstance(given, Tensor) and np.issubdtype(given.dtype, np.floating):
            # Of any byte order and stride; what overflows is not finite.
            with np.errstate(over="ignore"):
                tensor = torch.from_numpy(np.array(given, dtype=np.float32, order="C"))
        if (
            not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or tensor.dim() != 2
            or 0 in tensor.shape
        ):
            raise DataError(
                f"{self.name}: {key!r} must be floating-point numbers (S, D), at least 1 x 1, got "
                f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            )
        tensor = tensor.float().contiguous()
        if not tensor.isfinite().all():
            raise DataError(f"{self.name}: {key!r} has a number that is not finite")
        return tensor

    @classmethod
    def read(cls, path: str | Path) -> Features:
        """The arrays of a file of safetensors, or of numpy, whose name ends in ``.npz``.

        Nothing in the file is run.

        Raises:
            DataError: the file is of another kind or damaged, or as the constructor.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if path.suffix == ".npz":
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {key: file[key] for key in file.files}
            except OSError:
                raise
            except Exception as error:  # numpy parses archives and headers: it may be any
                raise DataError(
                    f"{path}: not a file of numpy arrays: {numpy_reason(error)}"
                ) from error
        else:
            safetensors = require("safetensors.torch", extra="train")
            try:
                arrays = safetensors.load(path.read_bytes())
            except require("safetensors", extra="train").SafetensorError as error:
                raise DataError(f"{path}: not a file of safetensors: {error}") from error
        return cls(arrays, name=str(path))

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def encode(self, tokens: Sequence[str]) -> Tensor:
        """(S, D), the array that a source names, which is its only token.

        Raises:
            DataError: there is no such array.
        """
        (key,) = tokens
        if key not in self._tensors:
            raise DataError(f"{self.name}: has no array {key!r}")
        return self._tensors[key]


def given_features(given: Features | Mapping[str, Any] | str | Path | None) -> Features | None:
    """Features as functions take them: made, in memory, or in a file."""
    if given is None or isinstance(given, Features):
        return given
    return Features.read(given) if isinstance(given, (str, Path)) else Features(given)


class ReadsFeatures:
    """What holds models, and the features that these read, if they read any."""

    _features: Features | None

    def _configs(self) -> list[dict[str, Any]]:
        """The options of the models."""
        raise NotImplementedError

    @property
    def features(self) -> Features | None:
        """The arrays that lines are the names of, for a model that reads features.

        Raises:
            DataError: when set, to those of another size than the model reads, or though it reads
                text. It is a ValueError.
        """
        return self._features

    @features.setter
    def features(self, features: Features | None) -> None:
        if features is not None:
            for size in (config["source_features"] for config in self._configs()):
                if size is None:
                    raise DataError(f"{features.name}: this model reads text, not features")
                if features.size != size:
                    raise DataError(
                        f"{features.name}: features must have {size} columns like the model's, "
                        f"got {features.size}"
                    )
        self._features = features

    def named_features(self) -> Features:
        """The arrays that sources name.

        Raises:
            DataError: they have not been given.
        """
        if self._features is None:
            raise DataError(
                "this model reads features, not text: give it those that lines name, by "
                "--source-features or as features of load"
            )
        return self._features
