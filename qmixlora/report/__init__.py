"""Reports of a run, from the files in its folder alone."""
