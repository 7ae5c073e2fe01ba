"""Studies: models x methods x tasks x seeds, run by local processes, one report."""
