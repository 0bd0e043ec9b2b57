"""Crops, resizing and colours of decoded images."""
