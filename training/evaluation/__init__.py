"""Loss and bits per byte of a model directory on any text."""
