"""Examples; a package, so that its modules are found by name from the repository's root."""
