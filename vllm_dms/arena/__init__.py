"""What scheduler and worker agree on; imports neither side."""
