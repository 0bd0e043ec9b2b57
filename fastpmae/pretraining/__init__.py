"""The parts of the training loop: data, step, losses, optimizer, compilation, metrics."""
