"""One execution of a stage: hosts, plans from options, jobs, compilation, executables, profiles."""
