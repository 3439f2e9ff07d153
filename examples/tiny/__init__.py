"""How the embedded checkpoint is made, and what it is compared with: see README.md."""
