"""The handful of ways to act on a site: the only code that touches torch modules."""
