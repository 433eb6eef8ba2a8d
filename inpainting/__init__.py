"""The parts of inpainting training, one noun a file; nothing in here imports Lightning."""
