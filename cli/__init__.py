"""The command line: one verb per file, no logic, late imports."""
