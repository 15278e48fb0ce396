# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The interface of a model adapter: :class:`ModelAdapter`, :class:`Block`, :func:`blocks_of`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A transformer block and the targets inside it: modules whose tokens can be merged.

    A target is named by its kind: 'attn', 'crossattn', 'mlp'. Fields that list kinds also take
    'block', the block as a whole.

    Attributes:
        name: dotted path of the block inside the network.
        module: called with (B, N, C) tokens, or a (B, C, h, w) image of them, as the first
            argument or as ``hidden_states``. Tokens are matched by this input.
        grid_module: the module whose call shows the token grid, see :meth:`ModelAdapter.grid`.
            The network itself where all blocks share one grid.
        downsample: factor per side between the network's finest grid and the block's.
        targets: kind -> the module to merge around, or several that run one after the other. In
            the order in which the block runs them.
        shared_input: kind -> other modules that receive the same input as the target's first
            module, e.g. ``to_k`` and ``to_v`` next to ``to_q``.
        second_attention: kind -> a second module of that kind with its own input, which runs
            right after the first.
        context_argument: the self-attention's argument for the tokens of keys and values. Default
            None: it has none, so keys and values are merged after projection if ``image_keys``
            says where they are.
        mask_argument: the self-attention's argument for a bias (B, 1, keys) that is added to the
            scores of keys. Default None: it has none.
        image_keys: of a self-attention without such an argument, where the image's keys are in
            the ``scaled_dot_product_attention`` that it calls: 'first', 'last' (the others are
            the text's). Default None: not known, so its keys can be neither weighed nor merged.
        output_index: kind -> index of the image tokens in the tuple that is returned. Default 0,
            or no tuple.
        joint_sequence: kinds whose module receives text and image tokens in one sequence, the
            text where :meth:`ModelAdapter.num_text_tokens_before` says. Text is not merged.
        refused: kind -> why tokens cannot be merged there and what to write instead: two
            sentences without the final full stop.
    """

    name: str
    module: nn.Module
    grid_module: nn.Module
    downsample: int
    targets: dict[str, nn.Module | Sequence[nn.Module]] = field(default_factory=dict)
    shared_input: dict[str, Sequence[nn.Module]] = field(default_factory=dict)
    second_attention: dict[str, nn.Module] = field(default_factory=dict)
    context_argument: str | None = None
    mask_argument: str | None = None
    image_keys: str | None = None
    output_index: dict[str, int] = field(default_factory=dict)
    joint_sequence: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


def blocks_of(
    network: nn.Module,
    list_name: str,
    grid_module: nn.Module | None = None,
    attn: str | Sequence[str] | None = "attn",
    crossattn: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = "ff",
    *,
    mlp_first: bool = False,
    **flags: Any,
) -> list[Block]:
    """Return one :class:`Block` for every member of a list of blocks.

    Args:
        network: contains the list.
        list_name: dotted path of the list inside ``network``.
        grid_module: see :class:`Block`. Default: ``network``.
        attn, crossattn, mlp: attribute of a block with the target of that kind, or several that
            run one after the other. No such target: None, also as the value of a single
            attribute, or a single attribute that a block lacks.
        mlp_first: whether a block runs ``mlp`` before ``attn``. Default False.
        **flags: other fields of :class:`Block`, the same for all. ``downsample`` defaults to 1.
    """
    names = {"attn": attn, "crossattn": crossattn, "mlp": mlp}
    if mlp_first:
        names = {"mlp": names.pop("mlp"), **names}
    flags = {"downsample": 1, **flags}
    flags["grid_module"] = network if grid_module is None else grid_module
    blocks = []
    for index, block in enumerate(network.get_submodule(list_name)):
        found = {
            kind: [getattr(block, one) for one in name]
            if not isinstance(name, str)
            else getattr(block, name, None)
            for kind, name in names.items()
            if name is not None
        }
        targets = {kind: target for kind, target in found.items() if target is not None}
        blocks.append(Block(f"{list_name}.{index}", block, targets=targets, **flags))
    return blocks


def is_a(module: nn.Module, *names: str) -> bool:
    """Return whether one of these names is that of the module's class or of a base class.

    By name, so that diffusers and MMagic need not be imported.
    """
    return any(base.__name__ in names for base in type(module).__mro__)


def argument(
    args: tuple, kwargs: dict[str, Any], position: int | None, name: str, default: Any = None
) -> Any:
    """Return one argument of a call. ``position`` None: it is passed by name only."""
    if position is not None and len(args) > position:
        return args[position]
    return kwargs.get(name, default)


class ModelAdapter:
    """Describes one model family. Stateless; its methods are called while the model runs.

    Attributes:
        description: a short phrase for error messages.
        class_names: names of the network classes that :meth:`matches` recognizes.
        timestep_position: index of the timestep among the positional arguments of the network's
            forward. Default None: it is passed by name only.
        timestep_name: its name there. Default 'timestep'.
        timestep_scale: the timestep of pure noise, as :meth:`timestep` returns it; that of no
            noise is 0. Default 1000.0; 1.0 where pipelines divide by 1000. None: no fixed scale.
        has_frames: whether blocks receive the frames of a clip as batch entries, all of the first
            clip before those of the second. Default False.
        inner_errors: how much the output errs if the region inside one or two outer blocks
            (:meth:`inner_modules`) is extrapolated, relative to extrapolating the output itself.
            Default (0.9, 0.9), measured on a transformer: what its first blocks compute hardly
            matters once the others are extrapolated.
        takes_masks: whether masks that blocks or attention receive fit merged tokens, because
            they cover text only or :meth:`adapt` merges them. Default False: a mask is an error.
    """

    description: str
    class_names: tuple[str, ...] = ()
    timestep_position: int | None = None
    timestep_name: str = "timestep"
    timestep_scale: float | None = 1000.0
    has_frames: bool = False
    inner_errors: tuple[float, float] = (0.9, 0.9)
    takes_masks: bool = False

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a network of this family. Default: :attr:`class_names`."""
        return is_a(module, *self.class_names)

    def blocks(self, network: nn.Module) -> list[Block]:
        """Return all blocks in the order in which they run."""
        raise NotImplementedError

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the timestep of a call of the network: a tensor, a number, or None.

        It must fall along a run; an adapter whose network counts upwards inverts it. Of one
        timestep per token, (B, N), it returns that of the last tokens, (B,).
        """
        timestep = argument(args, kwargs, self.timestep_position, self.timestep_name)
        if isinstance(timestep, Tensor) and timestep.dim() == 2:
            # Tokens of a given first frame have timestep 0 throughout; the last ones do not.
            return timestep[:, -1]
        return timestep

    def inner_modules(self, network: nn.Module, num_outer_blocks: int) -> list[nn.Module]:
        """Return the modules inside the outer blocks, in running order; empty if there are none.

        The rest of the network needs no output of theirs but the last one's. ``num_outer_blocks``,
        at least 1, counts levels of a UNet; elsewhere quarters of the longest list of blocks, at
        each end (1 leaves the middle half).
        """
        blocks = {block.module for block in self.blocks(network)}
        lists = [list(one) for one in network.children() if isinstance(one, nn.ModuleList)]
        longest = max(filter(blocks.issuperset, lists), key=len, default=[])
        edge = max(1, len(longest) * num_outer_blocks // 4)
        return longest[edge:-edge] if 2 * edge < len(longest) else []

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Return (height, width) in tokens, from the arguments of a call of a grid module."""
        raise NotImplementedError

    def frames(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """Return the number of frames per clip, from a call of the network. Default 1."""
        return 1

    def num_text_tokens_before(self, args: tuple, kwargs: dict[str, Any]) -> int | list[int] | None:
        """Return how many tokens precede the image tokens in a joint sequence.

        One number for the whole batch, or one per entry, from a call of the grid module. Tokens
        behind the image tokens are not merged either. Default None: all others are in front.
        """
        return None

    def check(self, target: str, args: tuple, kwargs: dict) -> None:
        """Refuse a call of a target that cannot be merged, whatever is merged there.

        Args:
            target: name of the target for error messages; ends with its kind.
            args, kwargs: of the call.

        Raises:
            ToMeError: an argument that has no meaning for merged tokens.
        """

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the arguments that fit merged tokens, such as position embeddings and masks.

        Args:
            target: name of the target for error messages; ends with its kind.
            plan (MergePlan): how the tokens were merged. A merged token takes the position of
                ``plan.representative``.
            args, kwargs: of the call, with the merged tokens in place. Not to be modified.

        Raises:
            ToMeError: an argument that has no meaning for merged tokens.
        """
        return args, kwargs
