"""unit: exact and small; integration: the commands; golden: equality with diffusers."""
