"""A delta of another method out of a delta, and how alike two deltas act."""
