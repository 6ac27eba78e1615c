"""A transformers model as an editor sees it."""
