"""Scripts that measure the trainer, and what they found."""
