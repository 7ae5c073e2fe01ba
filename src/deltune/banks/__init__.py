"""Banks: many deltas of one spec beside a model, of which a batch needs a few at a time."""
