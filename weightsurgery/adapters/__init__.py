"""PEFT adapters as updates of a checkpoint's tensors: what they say, and what they do to them."""
