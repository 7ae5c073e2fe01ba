"""Records, metrics, models and objectives; each name is imported from its own module."""
