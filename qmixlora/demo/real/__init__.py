"""A real language model, SmolLM2-135M-Instruct, that sees: the backbone for more than a toy, and its tasks."""
