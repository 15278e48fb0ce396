# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging in mmengine's runners: a hook, loops, metrics and a data set of prompts.

=============  ==================================================================
tome.py        ``ToMeHook``: reports, changes the ratio by a schedule
loops.py       ``ToMeTestLoop``, ``ToMeValLoop``: several methods, any metrics
metrics.py     ``ToMeMetric``, ``ToMeSeconds``
profile.py     times of the network, its blocks and targets, by method
prompts.py     ``ToMePromptDataset``: prompts, and perhaps real images
subject.py     the model of a runner, and generating with it
=============  ==================================================================

``custom_imports = dict(imports=['mmagic_tome'])`` in a config registers them all.
"""
