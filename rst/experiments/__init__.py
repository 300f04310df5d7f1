"""Many runs: the command line, sweeps, tables of runs and what they cost."""
