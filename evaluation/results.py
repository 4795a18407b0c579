"""Results of a classifier as entries of metrics.json.

Shapes: N images, K classes.
"""

from typing import Any

import numpy as np

from evaluation.metrics import bootstrap_interval, classification_metrics


def classification_results(logits: np.ndarray, labels: np.ndarray, name: str, seed: int) -> list[dict[str, Any]]:
    """Return all metrics of logits (N, K) and labels (N,); accuracies have a 95 % confidence interval."""
    hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]  # (N, 5)
    correct = {"accuracy": hits[:, 0], "top5_accuracy": hits.any(axis=1)}
    return [
        {
            "name": name,
            "metric": metric,
            "value": value,
            "interval": list(bootstrap_interval(correct[metric], seed)) if metric in correct else None,
            "n": len(labels),
        }
        for metric, value in classification_metrics(logits, labels).items()
    ]
