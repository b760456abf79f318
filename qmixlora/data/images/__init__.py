"""Open an image as a viewer shows it; find its file; tell images apart unopened; shapes that processors refuse."""
