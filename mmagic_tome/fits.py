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

import torch
from torch import Tensor


@dataclass
class Fit:
    """How an input follows from the last steps, in float64 on the CPU.

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
    weights: Tensor | None = None
    rates: Tensor | None = None
    norms: Tensor | None = None


def fit_input(
    x: Tensor,
    last: Tensor,
    previous: Tensor | None,
    outputs: Mapping[Hashable, Sequence[Tensor]],
    rates: Sequence[Sequence[Tensor]],
    copies: int,
) -> Fit:
    """Explain an input by what came before it.

    Args:
        x: (B * copies, n) sample of the input.
        last, previous: of the last input, and of the one before if there is one.
        outputs: branch -> the outputs of its last one or two steps, the newest first.
        rates: per interval between computed outputs, the oldest first: of each branch the change of
            its output per unit of the timestep. Empty if they are not asked for.
        copies: equal parts of the batch, 2 with classifier-free guidance.
    """

    def parts(tensor: Tensor) -> list[Tensor]:
        # A guided sampler combines what was predicted for all copies of an image.
        return [part.repeat(copies, 1) for part in tensor.chunk(copies)]

    columns, owner, ages = [last], [None], [0]
    for branch, known in outputs.items():
        for age, output in enumerate(known):
            for part in parts(output):
                columns.append(part)
                owner.append(branch)
                ages.append(age)
    if previous is not None:
        columns.append(previous)
    count = len(columns)
    columns += [part for step in rates for rate in step for part in parts(rate)]
    wide = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    rows = torch.stack([*columns, x], dim=1).to(wide)
    products = (rows @ rows.mT).cpu().double()
    if not products.isfinite().all():
        return Fit()
    images = products[: len(products) // copies]
    fit = Fit(norms=images[:, -1, -1].sqrt())
    if rates:
        each = (len(columns) - count) // len(rates)
        block = images[:, count:-1, count:-1]
        fit.rates = block.reshape(len(images), len(rates), each, len(rates), each)
    products = _moving(_chosen(products, [*range(count), -1]))
    weights = _least_squares(products)
    length = products.sum(0).diagonal().sqrt().clamp_min(1e-30)
    fit.shares = dict.fromkeys(outputs, 0.0)
    for branch, age, weight in zip(owner[1:], ages[1:], (weights * length[:-1] / length[-1])[1:]):
        if age == 0:
            fit.shares[branch] += float(abs(weight))
    weights = torch.cat([weights, weights.new_tensor([-1.0])])
    residuals = torch.einsum("k,bkl,l->b", weights, products, weights).clamp_min(0)
    own = products[:, -1, -1].clamp_min(1e-30)
    fit.residual = float((residuals / own).max().sqrt())
    if rates:
        fit.weights = _weights(products, ages[1:])
    return fit


def _weights(products: Tensor, ages: Sequence[int]) -> Tensor | None:
    """See :class:`Fit`: of outputs with these ages, which are the columns from the second on."""
    number = ages.count(0)
    if number == 0 or ages.count(1) not in (0, number):
        return None
    # The input before the last would make it ambiguous: it follows from the others.
    weights = _least_squares(_chosen(products, [*range(len(ages) + 1), -1]))[1:]
    found = [weights[[i for i, one in enumerate(ages) if one == age]] for age in sorted(set(ages))]
    return torch.stack(found).sum(0)


def _chosen(products: Tensor, columns: list[int]) -> Tensor:
    return products[:, columns][:, :, columns]


def _moving(products: Tensor) -> Tensor:
    """Without images whose input is only scaled: conditioning, such as ViCo's reference image."""
    new, last, both = products[:, -1, -1], products[:, 0, 0], products[:, 0, -1]
    moves = new * last - both**2 > 1e-10 * new * last
    return products[moves] if moves.any() else products


def _least_squares(products: Tensor) -> Tensor:
    """(K,) weights with which K columns explain the last one, from (B, K + 1, K + 1) inner
    products."""
    total = products.sum(0)
    # Columns of unit length: outputs may be a thousand times smaller than inputs.
    length = total.diagonal().sqrt().clamp_min(1e-30)
    gram = total / length / length[:, None]
    weights = torch.linalg.pinv(gram[:-1, :-1], hermitian=True, rtol=1e-10) @ gram[:-1, -1]
    return weights * length[-1] / length[:-1]
