"""Recalls of a search for the text of an image, and for the images of a text.

Shapes: N pairs of an image and a text, I different images and T different texts among them, E width of an embedding.
"""

import numpy as np

RECALLS = (1, 5, 10)


def retrieval_metrics(
    images: np.ndarray, texts: np.ndarray, labels: np.ndarray, image_numbers: np.ndarray | None = None
) -> dict[str, float]:
    """Return recalls at 1, 5 and 10: of a text of each image among the different texts, and the other way around.

    A text finds an image if the image has this text, and an image a text; of both there may be several, of which the
    nearest counts. What is equally near, or not a number, counts as nearer than what is searched for, so that equal
    embeddings find nothing.

    Args:
        images, texts: (N, E), embeddings of length 1.
        labels: (N,), the number of each text.
        image_numbers: (N,), the number of each image; None if all images differ.
    """
    if image_numbers is None:
        image_numbers = np.arange(len(labels))
    _, first_image, image = np.unique(image_numbers, return_index=True, return_inverse=True)
    _, first_text, text = np.unique(labels, return_index=True, return_inverse=True)
    similarities = images[first_image] @ texts[first_text].T  # (I, T)
    is_pair = np.zeros(similarities.shape, bool)
    is_pair[image, text] = True
    own = np.where(is_pair, similarities, -np.inf)
    text_ranks = (~is_pair & ~(similarities < own.max(axis=1, keepdims=True))).sum(axis=1)  # (I,)
    image_ranks = (~is_pair & ~(similarities < own.max(axis=0))).sum(axis=0)  # (T,)
    found = {
        f"{kind}_recall_at_{k}": float((ranks < k).mean())
        for kind, ranks in (("text", text_ranks), ("image", image_ranks))
        for k in RECALLS
    }
    return {**found, "mean_recall": float(np.mean(list(found.values())))}
