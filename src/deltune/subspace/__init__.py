"""The unified optimisation subspace: solutions of several methods in one space of few numbers."""
