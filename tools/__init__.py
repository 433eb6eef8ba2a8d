"""Commands run by hand, thin over the parts: `python -m tools.<name>`."""
