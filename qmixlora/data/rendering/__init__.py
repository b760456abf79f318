"""From conversations to batches: text, tokens, labels, pixels."""
