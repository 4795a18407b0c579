"""Label-free measures of feature quality: effective rank, and spread over the images.

Papers: Garrido et al. 2023 (RankMe), arXiv:2210.02885, Eq. 1; Chen and He 2020 (SimSiam), arXiv:2011.10566, Sec. 4.1.
Shapes: N images, D feature dimension.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.seeds import seeded_generator

_MAX_IMAGES = 25_600  # as in Garrido et al.
_EPS = 1e-7


def rankme(features: Tensor, seed: int = 0) -> float:
    """Return the effective rank of features (N, D), exp(entropy of the singular values), from 1 to min(N, D)."""
    if len(features) > _MAX_IMAGES:
        chosen = torch.randperm(len(features), generator=seeded_generator(seed, "rankme"))[:_MAX_IMAGES]
        features = features[chosen.to(features.device)]
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp(min=_EPS) + _EPS
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: Tensor) -> float:
    """Return the std of normalized features (N, D) times sqrt(D): 0 if they collapsed, 1 if they spread evenly."""
    return float(F.normalize(features.float(), dim=1).std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)
