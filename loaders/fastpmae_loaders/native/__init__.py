"""Ordinary JPEGs decoded by compiled code of our own, to the bit as Pillow does."""
