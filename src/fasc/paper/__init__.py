"""What the paper alone needs (arXiv:2601.07197): its printed formula, its sketch, ρ as a selector of methods, its exclusions.

Its methods are registered through the entry points of the group ``fasc.methods``, as those of any other distribution.
"""
