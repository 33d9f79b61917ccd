"""Plans a run: compiles ahead of time, reads HLO, bounds the time of a step, writes a report."""
