"""The results of a classifier as entries of metrics.json.

Shapes: N images, K classes.
"""

from typing import Any

import numpy as np

from evaluation.metrics import bootstrap_interval, classification_metrics

_NUM_BEST = 5


def classification_results(logits: np.ndarray, labels: np.ndarray, name: str, seed: int) -> list[dict[str, Any]]:
    """Every metric of logits (N, K) and labels (N,), shares of right images with a 95 % interval."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :_NUM_BEST]  # (N, 5)
    hits = best == labels[:, None]
    right = {"accuracy": hits[:, 0], "top5_accuracy": hits.any(axis=1)}
    return [
        {
            "name": name,
            "metric": metric,
            "value": value,
            "interval": list(bootstrap_interval(right[metric], seed)) if metric in right else None,
            "n": len(labels),
        }
        for metric, value in classification_metrics(logits, labels).items()
    ]
