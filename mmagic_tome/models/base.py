# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The vocabulary in which a host describes its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Block:
    """A transformer block and the sites around which its tokens can be merged.

    Attributes:
        name (str): dotted path of the block inside the network.
        module (nn.Module): called with (B, N, C) tokens, or a (B, C, h, w) picture of them, as
            its first argument or as ``hidden_states``; what it is given is the metric.
        stack (nn.Module): the module whose call shows the token grid; the network itself where
            all blocks have the same.
        downsample (int): how many times coarser the block's grid is than the
            network's finest one, per side.
        sites (dict): kind of site ('attn', 'crossattn', 'mlp') -> the module that computes on
            tokens there, or several that run one after the other. In the order in which the
            block runs them.
        alike (dict): kind of site -> further modules that are given the same tokens as the first
            one of that site, such as the projections to keys and values beside that to queries.
        twins (dict): kind of site -> a second module of that kind in the same block, which gets
            tokens of its own and runs right after the first.
        context_argument (str): name of the argument of its self-attention for
            tokens to take keys and values from.
        mask_argument (str | None): name of the argument of its self-attention for numbers that are
            added to the scores of keys, (B, 1, keys). Default None: it has none.
        returns (dict): kind of site (also 'block') -> position of the picture's tokens in the
            tuple that is returned there. Default: 0, or no tuple at all.
        text_beside (tuple): kinds of site (also 'block') whose module is given the text's tokens
            and the picture's in one sequence: the text in front, or as :meth:`Host.text_before`
            says. The text is not merged.
        joint (tuple): kinds of site (also 'block') that compute the text's tokens from the
            picture's as well, so that they cannot be left out.
        refused (dict): kind of site -> why tokens cannot be merged there, and what to write
            instead; two sentences without the last full stop.
    """

    name: str
    module: nn.Module
    stack: nn.Module
    downsample: int
    sites: dict[str, nn.Module | Sequence[nn.Module]] = field(default_factory=dict)
    alike: dict[str, Sequence[nn.Module]] = field(default_factory=dict)
    twins: dict[str, nn.Module] = field(default_factory=dict)
    context_argument: str = "encoder_hidden_states"
    mask_argument: str | None = None
    returns: dict[str, int] = field(default_factory=dict)
    text_beside: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


class Host:
    """Description of one model family. Stateless; its methods are called while the model runs.

    Attributes:
        description (str): a short phrase for error messages.
        timestep_position (int | None): position of the timestep among the arguments of the
            network's forward. Default: None, given by name only.
        timestep_name (str): what the forward calls it. Default: ``timestep``.
        has_frames (bool): whether blocks are given the frames of a clip as batch entries, all of
            the first clip before those of the second. Default: False.
        takes_masks (bool): whether a mask that blocks or attention are given fits merged tokens:
            because it is the text's only, or since :meth:`adapt` sees to it. Default: False, a
            mask is refused.
    """

    description: str
    timestep_position: int | None = None
    timestep_name: str = "timestep"
    has_frames: bool = False
    takes_masks: bool = False

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a network of this family."""
        raise NotImplementedError

    def blocks(self, network: nn.Module) -> list[Block]:
        """All blocks of the network in the order in which they run."""
        raise NotImplementedError

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The timestep in a call of the network: a tensor, a number, or None.

        Default: what is at :attr:`timestep_position`, else what is called :attr:`timestep_name`.
        """
        position = self.timestep_position
        if position is not None and len(args) > position:
            return args[position]
        return kwargs.get(self.timestep_name)

    def noise_level(self, timestep: float) -> float:
        """A timestep as a share of the training steps: 1 = pure noise, 0 = none.

        Default: of 1000 steps, as of every published diffusion model; networks do not know it.
        """
        return timestep / 1000

    def deep(self, network: nn.Module, outer: int) -> list[nn.Module]:
        """The modules between the outer parts of the network, in running order.

        The output of the last one is all that the rest of the network needs of them.

        Args:
            network (nn.Module): the network.
            outer (int): how much is outside, at least 1: levels of a UNet, or where there are
                none, quarters of the blocks at each end (so that 1 leaves the middle half).

        Default: the middle of the network's longest list of blocks; nothing if they are too few.
        """
        blocks = {block.module for block in self.blocks(network)}
        lists = [
            list(child)
            for child in network.children()
            if isinstance(child, nn.ModuleList) and len(child) and blocks.issuperset(child)
        ]
        longest = max(lists, key=len, default=[])
        edge = max(1, len(longest) * outer // 4)
        return longest[edge:-edge] if 2 * edge < len(longest) else []

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """(height, width) in tokens, from a call of a stack."""
        raise NotImplementedError

    def frames(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """How many frames a clip has, from a call of the network. Default: 1."""
        return 1

    def text_before(self, args: tuple, kwargs: dict[str, Any]) -> int | list[int] | None:
        """How many tokens are in front of the picture's where both are in one sequence.

        Args:
            args, kwargs: of a call of the stack, as for :meth:`grid`.

        Returns:
            int | list | None: the same number for the whole batch, or one for each entry; tokens
            behind the picture's are not merged either. Default: None, all others are in front.
        """
        return None

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """What else a module needs changed when it is given merged tokens.

        Args:
            site (str): name of the site, for error messages; ends with its kind.
            plan (MergePlan): how the module's tokens were merged; ``plan.representative`` says
                whose position a merged token has.
            args, kwargs: of the call, with the merged tokens in place. Not to be changed.

        Returns:
            tuple: args and kwargs to call the module with. Default: as they are.

        Raises:
            ToMeError: an argument that has no meaning for merged tokens.
        """
        return args, kwargs
