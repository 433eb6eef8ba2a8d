"""Everything behind the embedded default: the pictures, the small base, how they were made."""
