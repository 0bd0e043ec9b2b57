"""The ranks of a run, how they meet, and tensors of which each holds a part."""
