"""What a run tells about itself, from the files in its folder alone."""
