# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The ``tune`` command: options for one model on one machine, found by measurement.

===========  ==================================================================
cli          options of the command and the checks that need no model
command      what it does, stage after stage
space        what can be tuned, and the moves from one candidate to the next
sampler      which steps a scheduler takes, and whether it adds noise between them
costs        seconds of the parts of a network on this machine
predict      seconds of a candidate, from what runs at each of its steps
judge        error of a candidate against the dense pictures
search       from candidate to candidate until the goal is met; no model in it
check        the winner beside dense, on prompts that the search did not see
folder       everything that was done already
plot         the Pareto picture
write        the config that comes out
===========  ==================================================================
"""
