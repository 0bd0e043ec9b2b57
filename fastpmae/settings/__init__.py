"""What settings have to do with each other, whichever group they stand in."""
