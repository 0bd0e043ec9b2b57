"""k-NN, linear probes and fine-tuning on labelled images."""
