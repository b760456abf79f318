"""The shipped recipes: flat YAML files, one per model and card."""
