"""What one types to serve exports: a folder of files for each server, with a client and the checks of each task."""
