"""What `make train` runs: photographs, a .beton file, a short pretraining, and what came of it."""
