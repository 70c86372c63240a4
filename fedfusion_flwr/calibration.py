# SPDX-License-Identifier: Apache-2.0
"""Label shift in a client's loss and predictions; usable in any client. Nothing leaves it.

Client k with n_ky examples of class y, n_k in all, C classes, and eps = `SMOOTHING`:

    q_k(y) = (n_ky / n_k + eps) / (1 + C eps)       its label prior
    training      cross-entropy of  f(x) + tau log q_k
    prediction    argmax of         f(x) + log q_k

Training is the logit-adjusted loss (Menon et al., ICLR 2021, "Long-tail learning via logit
adjustment", arXiv 2007.07314), with each client's own frequencies for those of the training set.
With tau = 1 and eps = 0 it is the balanced softmax, n_y exp f_y / sum_j n_j exp f_j (Ren et al.,
NeurIPS 2020, arXiv 2007.10740). FedLC (Zhang et al., ICML 2022, arXiv 2209.00189) calibrates
clients as well, but adds -tau n_ky^(-1/4) in place of tau log q_k. eps keeps classes that a client
does not have in its loss: without it they drop out, and the client forgets what separates them.

Prediction is Bayes' rule for another label prior (cf. Saerens et al., 2002): a model of
p(y | x) under uniform labels, times q_k(y).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfusion_flwr.errors import ArgumentError

SMOOTHING = 0.01
"""eps, the probability that a class without examples gets, before normalization."""


def label_log_prior(label_counts: Tensor) -> Tensor:
    """Log q_k, the logarithm of a client's smoothed label frequencies.

    Add it to logits (N, C) before the argmax, and the predictions are those of a client with these
    labels.

    Parameters
    ----------
    label_counts : Tensor
        Training examples of each class, shape (C,); not negative, not all 0. Only their ratios
        matter.

    Returns
    -------
    Tensor
        Shape (C,), float32, on the same device; the exponentials sum to 1.

    Raises
    ------
    ArgumentError
        If the counts are not such numbers.
    """
    counts = torch.as_tensor(label_counts).double()
    total = float(counts.sum())
    if counts.dim() != 1 or not 0 < total < float("inf") or bool((counts < 0).any()):
        raise ArgumentError(
            f"label_counts = {counts.tolist()!s:.60} is not allowed: one number for each class, "
            "none negative and not all 0"
        )
    prior = (counts / total + SMOOTHING) / (1 + len(counts) * SMOOTHING)
    return prior.log().float()


def calibrated_cross_entropy(
    logits: Tensor, targets: Tensor, label_counts: Tensor, tau: float = 0.5
) -> Tensor:
    """Mean cross-entropy of ``logits + tau * log q_k``: a client's loss that allows for its labels.

    All clients can then fit nearly the same function, whatever labels they hold.

    Parameters
    ----------
    logits : Tensor
        Shape (N, C), floating point.
    targets : Tensor
        Classes, shape (N,), int64.
    label_counts : Tensor
        The client's training examples of each class, shape (C,), see `label_log_prior`; on the CPU,
        a GPU need not wait for them.
    tau : float
        How much of the prior is taken out of the model, at least 0; 0 is plain cross-entropy.

    Returns
    -------
    Tensor
        A scalar that gradients flow through.

    Raises
    ------
    ArgumentError
        If tau is negative, or the counts are not such numbers or not one for each class.
    """
    if not tau >= 0:
        raise ArgumentError(f"tau = {tau!r} is not allowed: at least 0")
    prior = label_log_prior(label_counts)
    if logits.shape[-1] != len(prior):
        raise ArgumentError(
            f"label_counts of {len(prior)} classes are not allowed: the logits have "
            f"{logits.shape[-1]}"
        )
    return F.cross_entropy(logits + tau * prior.to(logits.device, logits.dtype), targets)
