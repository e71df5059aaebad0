"""Correlation of two columns, over any number of resamples at once.

# Shapes: ... resamples, n pairs
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pearson(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of the two columns of `[..., n, 2]`; 0 where a column is constant."""
    centred = columns - columns.mean(axis=-2, keepdims=True)
    x, y = centred[..., 0], centred[..., 1]
    covariance = np.asarray((x * y).sum(axis=-1))
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    result = np.zeros_like(covariance)
    np.divide(covariance, scale, out=result, where=scale > 0)
    return result


def spearman(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman rank correlation of the two columns of `[..., n, 2]`; ties take their mean rank."""
    # Here, because scipy.stats takes long to import and few tasks rank numbers.
    from scipy.stats import rankdata

    return pearson(rankdata(columns, axis=-2))
