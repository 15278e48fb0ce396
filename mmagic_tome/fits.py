# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How a network's input follows from the calls before it, by least squares.

A sampler computes the next latent as a linear combination of the last latents and outputs. Inner
products of samples of these tensors say how well that holds, with which weights, and how fast the
outputs change. They are the only values that leave the device, once per call.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_TINY = 1e-30
# Pairs of neighbours that are tried; shares of the elements between which a kept part lies.
_PAIRS, _FEW, _MOST = 64, 0.05, 0.99


@dataclass
class Fit:
    """How an input follows from the last steps, in float64.

    Args:
        residual: the largest relative residual of an image.
        shares: branch -> share of the input that its last output explains.
        weights: (P,) change of the input per unit of each output of a step, by branch and by copy
            within it; what multistep samplers take back at the next step is counted. None if it
            cannot be told, and without ``rates``.
        rates: (B, K, P, K, P) inner products of the last K changes of the outputs per unit of the
            timestep, the oldest first; B images, without their copies for guidance. None if fewer
            than two outputs are known.
        norms: (B,) norms of the input.
    """

    residual: float = math.inf
    shares: dict[Hashable, float] = field(default_factory=dict)
    weights: np.ndarray | None = None
    rates: np.ndarray | None = None
    norms: np.ndarray | None = None


def fit_input(
    x: Tensor,
    last: Tensor,
    previous: Tensor | None,
    outputs: Mapping[Hashable, Sequence[Tensor]],
    rates: Sequence[Sequence[Tensor]],
    copies: int,
    whole: Tensor,
) -> Fit:
    """Explain an input by what came before it.

    Args:
        x: (B * copies, n) sample of the input.
        last, previous: of the last input, and of the one before if there is one.
        outputs: branch -> the outputs of its last one or two steps, the newest first.
        rates: per interval between computed outputs, the oldest first: of each branch the change of
            its output per unit of the timestep. Empty if they are not asked for.
        copies: equal parts of the batch, 2 with classifier-free guidance.
        whole: (B * copies, n) sample of the input, of which ``x`` and all others may be a part.
    """

    def batch(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (copies, -1))

    def parts(tensor: Tensor) -> list[Tensor]:
        # A guided sampler combines what was predicted for all copies of an image.
        return [part.expand(copies, -1, -1) for part in tensor.chunk(copies)]

    columns, owner, ages = [batch(last)], [None], [0]
    for branch, known in outputs.items():
        for age, output in enumerate(known):
            for part in parts(output):
                columns.append(part)
                owner.append(branch)
                ages.append(age)
    if previous is not None:
        columns.append(batch(previous))
    count = len(columns)
    columns += [part for step in rates for rate in step for part in parts(rate)]
    rows = torch.stack([*columns, batch(whole), batch(x)], dim=2).to(_wide(x)).flatten(0, 1)
    # What follows has a dozen rows and columns: NumPy takes a third of torch's time for it.
    products = (rows @ rows.mT).cpu().double().numpy()
    if not np.isfinite(products).all():
        return Fit()
    images = products[: len(products) // copies]
    fit = Fit(norms=np.sqrt(images[:, -2, -2]))
    if rates:
        each = (len(columns) - count) // len(rates)
        block = images[:, count:-2, count:-2]
        fit.rates = block.reshape(len(images), len(rates), each, len(rates), each)
    products = _moving(_without(products, slice(count, -1)))
    weights = _least_squares(products)
    length = np.sqrt(products.sum(0).diagonal()).clip(_TINY)
    shares = np.abs(weights * length[:-1] / length[-1])
    fit.shares = dict.fromkeys(outputs, 0.0)
    for branch, age, share in zip(owner[1:], ages[1:], shares[1:]):
        if age == 0:
            fit.shares[branch] += float(share)
    weights = np.append(weights, -1.0)
    residuals = (products @ weights @ weights).clip(0)
    own = products[:, -1, -1].clip(_TINY)
    fit.residual = float(np.sqrt((residuals / own).max()))
    if rates:
        fit.weights = _weights(products, ages[1:])
    return fit


def held_elements(x: Tensor, last: Tensor, previous: Tensor, exact: float = 1e-4) -> Tensor:
    """Find what a pipeline puts back at every step, as inpainting does with the part to keep.

    There an input is clean latents and noise in a proportion of the step: the same combination of
    the two inputs before for all such elements, whatever the network said. It is found by trying
    the combinations that pairs of neighbours suggest (RANSAC: Fischler and Bolles, Communications
    of the ACM 24(6), 1981).

    Args:
        x, last, previous: (B, n) samples of an input and of the two before.
        exact: largest error of such a combination, relative to the input's root mean square.

    Returns:
        Tensor: (B, n) bool, all False where no such combination holds for many elements.
    """
    x, last, previous = (y.to(_wide(y)) for y in (x, last, previous))
    # Scattered by an odd stride: even ones meet the same columns of an image again and again.
    first = (torch.arange(_PAIRS, device=x.device) * 40503 + 7) % (x.shape[1] - 1)
    # Cramer's rule: x = a last + b previous at an element and at its neighbour.
    (x1, x2), (l1, l2), (p1, p2) = ((y[:, first], y[:, first + 1]) for y in (x, last, previous))
    determinant = l1 * p2 - l2 * p1
    determinant = torch.where(determinant.abs() < _TINY, torch.inf, determinant)
    a, b = (x1 * p2 - x2 * p1) / determinant, (l1 * x2 - l2 * x1) / determinant
    guesses = a[..., None] * last[:, None] + b[..., None] * previous[:, None]
    bound = exact * x.square().mean(1).sqrt()[:, None]
    held = (guesses - x[:, None]).abs() <= bound[..., None]  # (B, pairs, n)
    held = held[torch.arange(len(x), device=x.device), held.sum(2).argmax(1)]
    # The combination of all that agree, which rounding harms less than that of a pair.
    two = torch.stack([last, previous], 1) * held[:, None]
    gram, seen = two @ two.mT, two @ x[..., None]
    determinant = gram[:, 0, 0] * gram[:, 1, 1] - gram[:, 0, 1] ** 2
    determinant = torch.where(determinant.abs() < _TINY, torch.inf, determinant)[:, None]
    a = (seen[:, 0] * gram[:, 1, 1, None] - seen[:, 1] * gram[:, 0, 1, None]) / determinant
    b = (seen[:, 1] * gram[:, 0, 0, None] - seen[:, 0] * gram[:, 0, 1, None]) / determinant
    held = (a * last + b * previous - x).abs() <= bound
    share = held.double().mean(1, keepdim=True)
    return held & (share > _FEW) & (share < _MOST)


def _wide(x: Tensor) -> torch.dtype:
    """The widest type that the device of a tensor computes in."""
    return torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32


def _weights(products: np.ndarray, ages: Sequence[int]) -> np.ndarray | None:
    """See :class:`Fit`: of outputs with these ages, which are the columns from the second on."""
    number = ages.count(0)
    if number == 0 or ages.count(1) not in (0, number):
        return None
    # The input before the last would make it ambiguous: it follows from the others.
    weights = _least_squares(_without(products, slice(len(ages) + 1, -1)))[1:]
    found = [weights[[i for i, one in enumerate(ages) if one == age]] for age in sorted(set(ages))]
    return np.sum(found, axis=0)


def _without(products: np.ndarray, columns: slice) -> np.ndarray:
    """Inner products without those of some columns."""
    kept = np.delete(np.arange(products.shape[1]), columns)
    return products[:, kept[:, None], kept]


def _moving(products: np.ndarray) -> np.ndarray:
    """Without images whose input is only scaled: conditioning, such as ViCo's reference image."""
    new, last, both = products[:, -1, -1], products[:, 0, 0], products[:, 0, -1]
    moves = new * last - both**2 > 1e-10 * new * last
    return products[moves] if moves.any() else products


def _least_squares(products: np.ndarray) -> np.ndarray:
    """(K,) weights with which K columns explain the last one, from (B, K + 1, K + 1) inner
    products."""
    total = products.sum(0)
    # Columns of unit length: outputs may be a thousand times smaller than inputs.
    length = np.sqrt(total.diagonal()).clip(_TINY)
    gram = total / length / length[:, None]
    weights = np.linalg.pinv(gram[:-1, :-1], rcond=1e-10, hermitian=True) @ gram[:-1, -1]
    return weights * length[-1] / length[:-1]
