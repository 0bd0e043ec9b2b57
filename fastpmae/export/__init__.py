"""An encoder as others load it, and the model card beside it."""
