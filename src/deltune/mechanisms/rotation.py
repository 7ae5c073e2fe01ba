"""Rotations and reflections of features, applied to a matrix instead of the features.

A linear map of turned inputs x Q is one whose weight W (out, in) has its rows turned: W Q^T. An
embedding's rows are its vectors. So what turns features acts on the last dimension of the weight as
PyTorch stores it: (out, in), or (vocabulary, features) of an embedding.
"""

from torch import Tensor

from deltune.sites.site import Site


def features_last(site: Site, matrix: Tensor) -> Tensor:
    """A matrix (..., out, in) with the features that are turned last: the inputs of a map, the
    outputs of an embedding. Its own inverse."""
    return matrix.mT if site.kind == "embedding" else matrix


def turned_features(site: Site) -> int:
    """How many features there are to turn."""
    return site.shape[-2] if site.kind == "embedding" else site.shape[-1]
