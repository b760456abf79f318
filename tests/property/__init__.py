"""What must hold of all input: hypothesis draws it."""
