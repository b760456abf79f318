"""From a source to conversations, kept as a table that is mapped into memory."""
