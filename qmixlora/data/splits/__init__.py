"""Training, validation and test rows, and their tasks."""
