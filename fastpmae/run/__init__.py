"""A run's folder, and what is kept in it: checkpoints, metrics, settings."""
