"""A look at every row before the first step."""
