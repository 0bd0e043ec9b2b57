"""Images with dense labels: masks of classes, and boxes."""
