"""What transformers does with each architecture's checkpoint, as data.

Facts about classes and the functions that apply them to names belong here; tensors do not.
"""
