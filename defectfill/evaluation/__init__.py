"""Whether generated images help a detector, and how near they are to real ones."""
