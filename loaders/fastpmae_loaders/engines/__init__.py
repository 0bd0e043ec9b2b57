"""What decodes: FFCV's decoder, DALI or Pillow, on threads that make batches ahead."""
