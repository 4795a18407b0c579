"""Recalls of a search for the text of an image, and for the images of a text.

Shapes: N pairs of an image and a text, T different texts among them, E width of an embedding.
"""

import numpy as np

RECALLS = (1, 5, 10)


def retrieval_metrics(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return recalls at 1, 5 and 10: of the text of each image among the different texts, and the other way around.

    A text finds an image if the image has this text, of which there may be several. What is equally near, or not a
    number, counts as nearer than what is searched for, so that equal embeddings find nothing.

    Args:
        images, texts: (N, E), embeddings of length 1.
        labels: (N,), the number of each text.
    """
    numbers, first, own = np.unique(labels, return_index=True, return_inverse=True)
    similarities = images @ texts[first].T  # (N, T)
    of_own, is_other = similarities[np.arange(len(labels)), own], own[:, None] != np.arange(len(numbers))
    text_ranks = (is_other & ~(similarities < of_own[:, None])).sum(axis=1)  # (N,)
    best = np.array([similarities[own == number, number].max() for number in range(len(numbers))])
    image_ranks = (is_other & ~(similarities < best)).sum(axis=0)  # (T,)
    found = {
        f"{kind}_recall_at_{k}": float((ranks < k).mean())
        for kind, ranks in (("text", text_ranks), ("image", image_ranks))
        for k in RECALLS
    }
    return {**found, "mean_recall": float(np.mean(list(found.values())))}
