# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What MMagic's Stable Diffusion classes gain."""

from ..engine import apply_tome, get_handle
from .spellings import apply_model_level, apply_top_level, read

__all__ = ["ToMeMixin"]


class ToMeMixin:
    """Token merging by config for a model class of MMagic; stands before it in the bases.

    A class of your own becomes configurable like this::

        @MODELS.register_module()
        class MyDiffusion(ToMeMixin, StableDiffusion):
            ...

    Args:
        *args, **kwargs: Arguments of the model class. ``tomesd_cfg``, MMagic's own key,
            means the same as ``tome_cfg`` here: MMagic's implementation of it fails on
            every current diffusers UNet, and is never run.
        tome_cfg (dict | ToMeConfig, optional): Options of :class:`mmagic_tome.ToMeConfig`.
            Default: None, the model is left as it is.

    Raises:
        ToMeError: Before the model is built, for an invalid value or for ``tome_cfg`` and
            ``tomesd_cfg`` that differ; afterwards if there is nothing to merge in it.
    """

    def __init__(self, *args, tome_cfg=None, **kwargs):
        read(tome_cfg=tome_cfg, tomesd_cfg=kwargs.get("tomesd_cfg"))
        super().__init__(*args, **kwargs)
        # Only now is the UNet the one that will run: FastComposer replaces it, ViCo
        # its transformers. A positional ``tomesd_cfg`` shows only now as well.
        self.__dict__["_tome_built"] = True
        tomesd_cfg = getattr(self, "tomesd_cfg", None)
        apply_model_level(self, read(tome_cfg=tome_cfg, tomesd_cfg=tomesd_cfg))

    def set_tomesd(self):
        """Apply ``self.tomesd_cfg``, by this package's engine.

        MMagic calls it in the middle of ``__init__``, where it does nothing yet.
        """
        if self.__dict__.get("_tome_built") and self.tomesd_cfg is not None:
            apply_tome(self, read(tomesd_cfg=self.tomesd_cfg))

    @property
    def tome_handle(self):
        """ToMeHandle | None: the token merging in force; None on an untouched model.

        Looked up when asked for, so it is right for a copy and an unpickled model, and
        after ``apply_tome`` or ``remove_tome``.
        """
        return get_handle(self)

    @property
    def cfg(self):
        """The whole config, as MMagic's ``init_model`` and inferencers leave it here.

        Assigning one with a ``tome_cfg`` at its top level applies it. It is the only
        place where both pass by after the model was built, also when this package is
        imported by that very config.
        """
        try:
            return self.__dict__["cfg"]
        except KeyError:
            raise AttributeError("cfg") from None  # as if there were no property

    @cfg.setter
    def cfg(self, cfg):
        self.__dict__["cfg"] = cfg
        apply_top_level(self, cfg)
