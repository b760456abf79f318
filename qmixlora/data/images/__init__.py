"""Open an image as a viewer shows it; find its file; shapes that processors refuse."""
